"""The contract: what a run may ask for and what a stage hands on. Imports nothing of the other layers."""
