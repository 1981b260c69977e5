"""Lightning callbacks: routing statistics, throughput, samples, guards."""
