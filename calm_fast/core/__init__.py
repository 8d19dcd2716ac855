"""Code that every room uses: dispatch, argument checks, launch configs, the native library, error bounds, versions."""
