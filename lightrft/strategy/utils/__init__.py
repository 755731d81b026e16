"""What all strategies share."""
