"""Measurements that take too long for the tests. Each writes a JSON file and prints the table of it."""
