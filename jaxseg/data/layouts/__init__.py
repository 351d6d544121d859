"""Which files of a folder are a dataset, layout by layout: a folder comes in, a `Dataset` goes out.

No image and no label is opened here; `find` recognises the layout.
"""
