"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Figures:
    """Answers by route and status, finishes, seconds of speech, time to the first sample that is heard; rows and queue."""

    def __init__(self, engine):
        self.registry = CollectorRegistry()
        self.answers = Counter("csm_nb_answers", "Answers", ["route", "status"], registry=self.registry)
        self.finish = Counter("csm_nb_finish", "Why utterances ended: end, or length", ["finish"], registry=self.registry)
        self.seconds = Counter("csm_nb_speech_seconds", "Speech that was handed out", registry=self.registry)
        self.first = Histogram("csm_nb_first_audible_seconds", "From the request to the first sample that is heard",
                               registry=self.registry, buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30))
        for name, text, count in (("csm_nb_rows_taken", "Utterances that are being spoken", engine.count_taken),
                                  ("csm_nb_waiting", "Requests that wait for a row", lambda: len(engine.waiting)),
                                  ("csm_nb_adapters", "Adapters that can be asked of", lambda: len(
                                      {reader.name for reader in engine.shelf.readers.values()} - {""}))):
            Gauge(name, text, registry=self.registry).set_function(count)
        for finish in ("end", "length"):
            self.finish.labels(finish)

    def write(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)
