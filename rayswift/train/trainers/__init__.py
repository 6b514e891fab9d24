"""What changes of the libraries' trainers, one file a stage."""
