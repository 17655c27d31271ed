"""What a notebook lets one pick by hand; each widget is a shell around a call that a plain cell can make as well."""

import functools

import ipywidgets
from IPython.display import display

from csm_nb.fidelity import traits
from csm_nb.fidelity.clips import code_clips, find_clips, list_languages, name_clip, name_condition
from csm_nb.languages import get_language
from csm_nb.show import players, sound


def show_clip(row: dict, codec, codebooks: int) -> None:
    """Show one clip (a manifest row) before and after the codec: F0, spectrograms, players at their true levels."""
    (clip,) = code_clips([row], codec, [codebooks], controls=False)
    condition = name_condition(codebooks)
    display(sound.draw_clip(clip, condition))
    display(players.players([("original", clip.original), (condition, clip.versions[condition])]))


def show_examples(coded: dict, table, condition: str) -> None:
    """Show one word per trait (of traits.code_traits, picked by weigh_traits' table), before and after: figure, players."""
    for name, clip in traits.pick_examples(coded, table).items():
        display(sound.draw_clip(clip, condition, f"{name}: {clip.title}"))
        display(players.players([("original", clip.original), (condition, clip.versions[condition])]))


def pick_clip(codec, recordings: str, language: str, codebooks, count: int, seed: int, out_dir) -> ipywidgets.VBox:
    """Return a picker of language, clip and number of codebooks around `show_clip`.

    Languages are those that `recordings` has (all of the table where it is empty and espeak-ng speaks); the clips are
    those that the notebook would take, `count` at most, found or spoken when their language is picked.
    """
    find = functools.cache(lambda code: find_clips(recordings, code, count, seed, out_dir)[0])
    names = [(get_language(code).name, code) for code in list_languages(recordings, language)]
    languages = ipywidgets.Dropdown(options=names, value=language, description="language")
    clips = ipywidgets.Dropdown(description="clip", layout={"width": "34em"})
    counts = ipywidgets.SelectionSlider(options=sorted(codebooks), value=max(codebooks), description="codebooks")
    shown = ipywidgets.Output()

    @shown.capture(clear_output=True, wait=True)
    def list_clips(_change=None):
        rows = find(languages.value)
        clips.options = [(f"{i + 1}: {name_clip(row)}", (languages.value, i)) for i, row in enumerate(rows)]
        clips.index = 0  # a list that was empty selects nothing by itself

    @shown.capture(clear_output=True, wait=True)
    def show(_change=None):
        if clips.value:
            code, number = clips.value
            show_clip(find(code)[number], codec, counts.value)

    languages.observe(list_clips, "value")
    clips.observe(show, "value")
    counts.observe(show, "value")
    list_clips()
    return ipywidgets.VBox([ipywidgets.HBox([languages, counts]), clips, shown])
