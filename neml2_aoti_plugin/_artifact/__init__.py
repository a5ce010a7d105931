"""What neml2-compile wrote: the layout on disk, the metadata as frozen objects, whether they may run here."""
