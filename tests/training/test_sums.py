from swim_fast.training.sums import Sums


def test_tags_without_mask_are_logged_where_there_are_any():
    assert "tags_without_mask" not in Sums(labels=1).average()
    total = Sums(labels=1, tags_without_mask=2) + Sums(labels=1, tags_without_mask=1)
    assert total.average()["tags_without_mask"] == 3
