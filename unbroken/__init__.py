"""What every process of Unbroken has in common."""
