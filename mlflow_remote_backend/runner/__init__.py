"""What runs where the job runs: prepare, execute, observe. Imports of this package stay light on purpose."""
