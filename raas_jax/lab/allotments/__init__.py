"""What is said of allotments, and what they are compared with."""
