//! What a server counts, in the format of Prometheus. Labels are words of this program and names of namespaces, never names of sessions or
//! subjects: what a peer chooses makes no series.

use core::fmt::Write as _;
use std::collections::BTreeMap;

use mainstay_protocol::error::Code;
use mainstay_protocol::session::Verdict;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// A word of this program as a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Word(&'static str);

impl EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), core::fmt::Error> {
        encoder.write_str(self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByLimit {
    limit: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCode {
    code: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByVerdict {
    verdict: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByWork {
    work: Word,
}

macro_rules! limits {
    ($( $name:ident $word:literal, )+) => {
        /// A limit of the specification's section 22.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Limit { $( $name, )+ }

        impl Limit {
            const ALL: &[Self] = &[$( Self::$name, )+];

            /// Its name, section first; in the configuration that of its setting, where it has one.
            pub(crate) const fn as_str(self) -> &'static str {
                match self { $( Self::$name => $word, )+ }
            }
        }
    };
}

limits! {
    SubjectConnections "subject.connections",
    SubjectConnects "subject.connects",
    SubjectAppends "subject.appends",
    SubjectAppendBytes "subject.append_bytes",
    SubjectAttaches "subject.attaches",
    SubjectCreates "subject.creates",
    SubjectLookups "subject.lookups",
    SubjectPresence "subject.presence",
    SubjectSignals "subject.signals",
    SubjectRequests "subject.requests",
    SubjectStreams "subject.streams",
    SubjectRefusals "subject.refusals",
    ProducerRegardless "producer.regardless",
    SessionAttachments "session.attachments",
    SessionSubscriptions "session.subscriptions",
    SessionAppends "session.appends",
    SessionAppendBytes "session.append_bytes",
    SessionStoredBytes "session.stored_bytes",
    PrefixSessions "prefix.sessions",
    PrefixAppends "prefix.appends",
    PrefixAppendBytes "prefix.append_bytes",
    PrefixStoredBytes "prefix.stored_bytes",
}

/// Counts something for as long as it lives.
#[derive(Debug)]
pub(crate) struct Counted(Gauge);

impl Counted {
    pub(crate) fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Seconds from 100 µs to about 26 s.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.0001, 2.0, 19))
}

/// What one namespace counts.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) connections: Gauge,
    pub(crate) attachments: Gauge,
    pub(crate) subscriptions: Gauge,
    pub(crate) records: Counter,
    pub(crate) bytes: Counter,
    pub(crate) chunks: Counter,
    pub(crate) commit: Histogram,
    pub(crate) not_committed: Counter,
    pub(crate) unknown: Counter,
    pub(crate) delivered: Counter,
    pub(crate) history_reads: Counter,
    pub(crate) sessions: Gauge,
    refused: Family<ByLimit, Counter>,
    tokens: Family<ByCode, Counter>,
    verdicts: Family<ByVerdict, Counter>,
    batches_refused: Family<ByCode, Counter>,
    pub(crate) minted: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let refused = Family::default();
        // From the start: a rate is known of what was 0 before.
        for limit in Limit::ALL {
            drop(refused.get_or_create(&ByLimit { limit: Word(limit.as_str()) }));
        }
        Self {
            connections: Gauge::default(),
            attachments: Gauge::default(),
            subscriptions: Gauge::default(),
            records: Counter::default(),
            bytes: Counter::default(),
            chunks: Counter::default(),
            commit: seconds(),
            not_committed: Counter::default(),
            unknown: Counter::default(),
            delivered: Counter::default(),
            history_reads: Counter::default(),
            sessions: Gauge::default(),
            refused,
            tokens: Family::default(),
            verdicts: Family::default(),
            batches_refused: Family::default(),
            minted: Counter::default(),
        }
    }
}

impl Metrics {
    /// Something was refused, or is served later, for a limit.
    pub(crate) fn refused(&self, limit: Limit) {
        self.refused.get_or_create(&ByLimit { limit: Word(limit.as_str()) }).inc();
    }

    /// How often each limit refused something, or let it be served later; without those that did not.
    pub(crate) fn refusals(&self) -> BTreeMap<&'static str, u64> {
        let all = Limit::ALL.iter().map(|limit| limit.as_str());
        let counted = all.map(|limit| (limit, self.refused.get_or_create(&ByLimit { limit: Word(limit) }).get()));
        counted.filter(|(_, count)| *count > 0).collect()
    }

    /// A token was believed (`NO_ERROR`) or refused.
    pub(crate) fn token(&self, code: Code) {
        self.tokens.get_or_create(&ByCode { code: word(code) }).inc();
    }

    /// A batch was refused.
    pub(crate) fn batch_refused(&self, code: Code) {
        self.batches_refused.get_or_create(&ByCode { code: word(code) }).inc();
    }

    /// An attach was answered.
    pub(crate) fn verdict(&self, verdict: Verdict) {
        self.verdicts.get_or_create(&ByVerdict { verdict: Word(verdict.as_str()) }).inc();
    }

    /// Makes these part of what is shown, under the name of the namespace.
    pub(crate) fn register(&self, registry: &mut Registry, namespace: &str) {
        let label = ("namespace".into(), namespace.to_owned().into());
        let to = registry.sub_registry_with_label(label);
        to.register("connections", "Connections with a token in force", self.connections.clone());
        to.register("attachments", "Attachments that are open", self.attachments.clone());
        to.register("subscriptions", "Subscriptions that are open", self.subscriptions.clone());
        to.register("sessions_hot", "Sessions in memory", self.sessions.clone());
        to.register("appended_records", "Records that are durable", self.records.clone());
        to.register_with_unit("appended", "Bytes of chunks that are durable", Unit::Bytes, self.bytes.clone());
        to.register("committed_chunks", "Chunks that are durable", self.chunks.clone());
        let help = "From giving a chunk to the store to its answer";
        to.register_with_unit("commit", help, Unit::Seconds, self.commit.clone());
        let help = "Chunks that the store did not take; their batches were refused";
        to.register("not_committed_chunks", help, self.not_committed.clone());
        to.register(
            "unknown_chunks",
            "Chunks of which the store could not say whether it took them",
            self.unknown.clone(),
        );
        to.register_with_unit("delivered", "Bytes of deliveries", Unit::Bytes, self.delivered.clone());
        to.register("history_reads", "Reads of the store for subscriptions that lag", self.history_reads.clone());
        to.register("refused_requests", "Refused, or served later, for a limit, by its name", self.refused.clone());
        to.register("refused_batches", "Batches refused, by code", self.batches_refused.clone());
        to.register("tokens", "Tokens judged, by code; NO_ERROR: believed", self.tokens.clone());
        to.register("verdicts", "Attaches answered, by verdict", self.verdicts.clone());
        to.register("minted_tokens", "Narrower tokens made", self.minted.clone());
    }
}

fn word(code: Code) -> Word {
    Word(code.name().unwrap_or("UNKNOWN"))
}

/// What the whole server counts.
#[derive(Debug, Default)]
pub(crate) struct ServerMetrics {
    pub(crate) connections: Gauge,
    pub(crate) accepted: Counter,
    pub(crate) load: Gauge,
    /// Seconds by which the server's clock of chores was late last.
    pub(crate) late: Gauge<f64, std::sync::atomic::AtomicU64>,
    shed: Family<ByWork, Counter>,
}

impl ServerMetrics {
    /// Work was refused because there is too much.
    pub(crate) fn shed(&self, work: &'static str) {
        self.shed.get_or_create(&ByWork { work: Word(work) }).inc();
    }

    pub(crate) fn register(&self, to: &mut Registry) {
        to.register("open_connections", "Connections, with and without a token", self.connections.clone());
        to.register("accepted_connections", "Connections accepted", self.accepted.clone());
        to.register("load_level", "What is shed: 0 nothing, up to 5 (see the specification, LIM-6)", self.load.clone());
        let help = "By how much the last chore was late: what every request waits for a turn";
        to.register_with_unit("turn_late", help, Unit::Seconds, self.late.clone());
        to.register("shed_requests", "Refused because there was too much to do, by kind of work", self.shed.clone());
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn what_is_counted_is_shown_under_the_name_of_its_namespace() {
        let mut registry = Registry::with_prefix("mainstay");
        let (metrics, other) = (Metrics::default(), Metrics::default());
        metrics.register(&mut registry, "default");
        other.register(&mut registry, "acme");
        metrics.records.inc_by(3);
        other.refused(Limit::SubjectSignals);
        metrics.token(Code::TOKEN_EXPIRED);
        let mut text = String::new();
        encode(&mut text, &registry).expect("text");
        for line in [
            r#"mainstay_appended_records_total{namespace="default"} 3"#,
            r#"mainstay_appended_records_total{namespace="acme"} 0"#,
            r#"mainstay_refused_requests_total{namespace="acme",limit="subject.signals"} 1"#,
            r#"mainstay_tokens_total{namespace="default",code="TOKEN_EXPIRED"} 1"#,
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
        }
    }
}
