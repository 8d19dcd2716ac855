"""What every room uses: choice of implementation, argument checks, launch configs, the compiled library, releases."""
