"""What posttrain is compared with. Each benchmark prints one table with its seeds and the hardware."""
