"""The files of trials and teachers, in folders and in object stores."""
