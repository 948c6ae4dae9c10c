"""What leaves the machine: one archive of the product, its bill of materials, and its signature."""
