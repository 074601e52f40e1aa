# SPDX-License-Identifier: Apache-2.0
"""Command lines of the scripts here: what a script's docstring says, and the option that was meant."""

import argparse
import difflib
import sys


class Parser(argparse.ArgumentParser):
    """Shows the docstring as it stands. An option that does not exist gets the nearest that does."""

    def __init__(self, text):
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        known = [option for action in self._actions for option in action.option_strings]
        strangers = [word.split("=")[0] for word in sys.argv[1:]
                     if word.startswith("--") and word.split("=")[0] not in known]
        if strangers:
            near = difflib.get_close_matches(strangers[0], known, 1, 0.7)
            message = (f"{strangers[0]}: no such option; " + (f"did you mean {near[0]}? " if near else "") +
                       "--help lists them")
        self.exit(2, f"{self.prog}: {message}\n")
