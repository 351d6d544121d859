"""Files of images and labels, format by format: a file comes in and a `Volume` goes out, and back.

`registry` chooses the format by the file's name. A volume's place in the world is decided by
`placement`, for all formats alike.
"""
