"""What lies beside the graphs in the folder that is deployed."""
