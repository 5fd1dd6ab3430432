"""The public Python API: what `import bigalign` offers."""
