"""From files to batches, and back: images and labels as they lie on disk.

A folder comes in; cases are found, verified, split by subject, preprocessed once, and go out as
batches of augmented patches. Labels and maps are written here too, in the place of their image.
"""
