"""Waves and spectra on the device: changes, codecs, bands, traits."""
