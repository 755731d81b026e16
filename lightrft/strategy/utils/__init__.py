"""What all training backends share."""
