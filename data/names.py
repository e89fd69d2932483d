"""Names of many files."""

import os
from array import array


class Names:
    """A list of file names of any bytes, in two pieces of memory.

    At ImageNet's size that is a sixth of what a list of paths takes; and a process that was forked reads it without copying
    it, where each text of a list is written to, its count of references, when it is looked at.
    """

    def __init__(self, names=()):
        self.text, self.ends = bytearray(), array("q")
        self.extend(names)

    def extend(self, names):
        for name in names:
            self.text += os.fsencode(name)
            self.ends.append(len(self.text))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        index = range(len(self))[index]
        return os.fsdecode(bytes(self.text[self.ends[index - 1] if index else 0 : self.ends[index]]))
