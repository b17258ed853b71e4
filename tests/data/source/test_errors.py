import pickle

import pytest
import torch.utils.data

from swim_fast.data.source.errors import DataError, RecordsChangedError
from swim_fast.errors import MissingLibraryError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain ü🐶", "plain ü🐶"), ("a\x1b[2J\nb", "a\\x1b[2J\\nb"), ("\ud800\0", "\\ud800\\x00"), ("\u202e", "\\u202e")],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown == printable(shown)
    error = DataError(text, source=text, record=1, name=text, key=text)
    assert str(error) == f"{shown}, record 1 ({shown}), {shown}: {shown}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error.within(name="other")) == str(error)


class Failing(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    "error", [RecordsChangedError("a: changed"), MissingLibraryError("install b"), DataError("c\x1b")]
)
def test_an_error_out_of_a_worker_process_is_one_line(error):
    loader = torch.utils.data.DataLoader(Failing(error), num_workers=1)
    with pytest.raises(type(error)) as caught:
        next(iter(loader))
    assert str(caught.value) == str(error)
