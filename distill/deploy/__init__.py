"""What happens to a student after training: export, and later quantisation and deployment reports."""
