"""What a release is trusted by: see README.md beside this file."""
