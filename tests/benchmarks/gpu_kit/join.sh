#!/bin/bash
# Check the pieces and unpack them beside this script. The pieces may have come one by one.
set -euo pipefail
cd "$(dirname "$0")"
sha256sum --quiet --check SHA256SUMS
cat kit.tar.??? | tar x
mkdir -p source
tar xf source.tar -C source
