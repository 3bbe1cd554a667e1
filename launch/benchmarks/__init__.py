"""The benchmarks, one module each: `run(options)` returns the rows that `launch.bench` prints."""
