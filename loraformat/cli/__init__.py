"""The command line: verbs over the library. Data on stdout, talk on stderr; exit 0 done, 1 the input, 2 usage."""
