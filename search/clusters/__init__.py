"""Ray on this machine or on many: which one, what its nodes hold, see and run."""
