"""The temporal attention operators in Triton: a program takes some (pixel, head) problems of F queries and keys."""
