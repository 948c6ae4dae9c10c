"""The contract: recipes, results and errors that all stages share. Imports no other layer."""
