"""One module per family of formats; `FORMATS` of `swim_fast.importing.run` lists them all."""
