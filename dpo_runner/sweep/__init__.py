"""Many runs as one experiment: axes -> points -> a directory with a job for each -> worker processes -> states."""
