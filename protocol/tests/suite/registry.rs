//! The code against `spec/registry.toml`, number by number, in both directions.

use std::collections::BTreeMap;

use bytes::Bytes;
use mainstay_protocol::registry as numbers;
use mainstay_protocol::session::{
    Change, Departure, Expected, InputPolicy, Intent, JobOutcome, Key, Kind, MessageId, Operation, Payload, RequestId,
    RequestOutcome, Resolution, RunId, RunMode, Signal, SignalId, SignalOutcome, StateChange, Status, Target, Verdict,
};
use mainstay_protocol::wire::{AttachMode, Body, Frame, Start, Subscribe, Writer};
use mainstay_protocol::{Advice, Code, Scope};
use toml::{Table, Value};

const REGISTRY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../spec/registry.toml");

fn registry() -> Table {
    std::fs::read_to_string(REGISTRY).expect("the registry").parse().expect("TOML")
}

fn table<'a>(registry: &'a Table, path: &str) -> &'a Table {
    path.split('.').fold(registry, |table, key| table[key].as_table().expect("a table"))
}

/// Name to number of a table whose entries hold the number under `key`, or are the number.
fn entries(registry: &Table, path: &str, key: &str) -> BTreeMap<String, u64> {
    table(registry, path)
        .iter()
        .map(|(name, value)| {
            let number = value.get(key).unwrap_or(value).as_integer().expect("a number");
            (name.clone(), u64::try_from(number).expect("not negative"))
        })
        .collect()
}

fn code<'a>(pairs: impl IntoIterator<Item = (&'a str, u64)>) -> BTreeMap<String, u64> {
    pairs.into_iter().map(|(name, number)| (name.to_owned(), number)).collect()
}

#[test]
fn frame_types_are_those_of_the_registry() {
    let in_code = code(Frame::TYPES.iter().map(|(kind, name)| (*name, *kind)));
    assert_eq!(in_code, entries(&registry(), "frames", "type"));
    let ignorable = Frame::TYPES.iter().filter(|(kind, _)| numbers::is_ignorable(*kind)).map(|(_, name)| *name);
    assert_eq!(ignorable.collect::<Vec<_>>(), ["EXPIRING"], "what a receiver may pass over");
}

#[test]
fn errors_are_those_of_the_registry_with_scope_and_advice() {
    let registry = registry();
    let in_code = code(Code::ALL.iter().map(|code| (code.name().expect("a known code"), code.0)));
    assert_eq!(in_code, entries(&registry, "errors", "code"));
    for code in Code::ALL {
        let entry = &table(&registry, "errors")[code.name().expect("a known code")];
        let scope = match code.scope() {
            Scope::Request => "request",
            Scope::Stream => "stream",
            Scope::Connection => "connection",
        };
        let advice = match code.advice() {
            Advice::Retry => "retry",
            Advice::Reattach => "reattach",
            Advice::Reauthenticate => "reauthenticate",
            Advice::Fix => "fix",
            Advice::GiveUp => "give up",
        };
        assert_eq!(entry["ends"].as_str(), Some(scope), "{code}");
        assert_eq!(entry["advice"].as_str(), Some(advice), "{code}");
    }
}

#[test]
fn kinds_controls_parameters_and_operations_are_those_of_the_registry() {
    let registry = registry();
    let kinds = code(Kind::ALL.iter().map(|kind| (kind.name().expect("a known kind"), kind.0)));
    assert_eq!(kinds, entries(&registry, "kinds", "kind"));
    for kind in Kind::ALL {
        let entry = &table(&registry, "kinds")[kind.name().expect("a known kind")];
        assert_eq!(entry["from"].as_str(), Some(kind.writes().as_str()));
    }
    use numbers::control;
    let controls = code([
        ("created", control::CREATED),
        ("fence", control::FENCE),
        ("producer", control::PRODUCER),
        ("stream", control::STREAM),
        ("trim", control::TRIM),
        ("resume", control::RESUME),
    ]);
    assert_eq!(controls, entries(&registry, "controls", ""));
    use numbers::{append, attach, goaway, hello, ping, subscribe};
    assert_eq!(code([("padding", ping::PADDING)]), entries(&registry, "parameters.PING", "id"));
    assert_eq!(code([("address", goaway::ADDRESS)]), entries(&registry, "parameters.GOAWAY", "id"));
    let hello = code([
        ("instance", hello::INSTANCE),
        ("agent", hello::AGENT),
        ("token", hello::TOKEN),
        ("bulk_window", hello::BULK_WINDOW),
        ("bulk_streams", hello::BULK_STREAMS),
        ("max_frame", hello::MAX_FRAME),
        ("max_record", hello::MAX_RECORD),
        ("max_batch_records", hello::MAX_BATCH_RECORDS),
        ("max_batch_bytes", hello::MAX_BATCH_BYTES),
        ("producer_window", hello::PRODUCER_WINDOW),
        ("max_attachments", hello::MAX_ATTACHMENTS),
    ]);
    assert_eq!(hello, entries(&registry, "parameters.HELLO", "id"));
    let attach =
        code([("incarnation", attach::INCARNATION), ("next", attach::NEXT), ("expire_after", attach::EXPIRE_AFTER)]);
    assert_eq!(attach, entries(&registry, "parameters.ATTACH", "id"));
    let subscribe = code([
        ("streams", subscribe::STREAMS),
        ("kinds", subscribe::KINDS),
        ("window", subscribe::WINDOW),
        ("folded", subscribe::FOLDED),
    ]);
    assert_eq!(subscribe, entries(&registry, "parameters.SUBSCRIBE", "id"));
    assert_eq!(code([("run_epoch", append::RUN_EPOCH)]), entries(&registry, "parameters.APPEND", "id"));
    // Their order is the one that they have in MINT, and a table of TOML has none.
    let text = std::fs::read_to_string(REGISTRY).expect("the registry");
    let (_, named) = text.split_once("[operations]\n").expect("operations");
    let named = named.lines().map_while(|line| line.split_once('=')).map(|(name, _)| name.trim());
    assert!(named.eq(Operation::ALL.into_iter().map(Operation::as_str)), "the operations, or their order");
}

#[test]
fn limits_and_versions_are_those_of_the_registry() {
    let registry = registry();
    let limits: [(&str, usize); 64] = [
        ("max_name", numbers::MAX_NAME),
        ("max_label", numbers::MAX_LABEL),
        ("max_subject", numbers::MAX_SUBJECT),
        ("max_token", numbers::MAX_TOKEN),
        ("max_grants", numbers::MAX_GRANTS),
        ("max_token_id", numbers::MAX_TOKEN_ID),
        ("max_delegations", numbers::MAX_DELEGATIONS),
        ("max_retry_after", numbers::MAX_RETRY_AFTER as usize),
        ("max_record", numbers::MAX_RECORD),
        ("max_headers", numbers::MAX_HEADERS),
        ("max_batch_records", numbers::MAX_BATCH_RECORDS),
        ("max_batch_bytes", numbers::MAX_BATCH_BYTES),
        ("max_frame", numbers::MAX_FRAME),
        ("max_frame_unauthenticated", numbers::MAX_FRAME_UNAUTHENTICATED),
        ("max_detail", numbers::MAX_DETAIL),
        ("producer_window", numbers::PRODUCER_WINDOW),
        ("max_streams", numbers::MAX_STREAMS),
        ("max_producers", numbers::MAX_PRODUCERS),
        ("max_resumptions", numbers::MAX_RESUMPTIONS),
        ("max_resume_token", numbers::MAX_RESUME_TOKEN),
        ("turn_bytes", numbers::TURN_BYTES),
        ("max_listed", numbers::MAX_LISTED),
        ("max_positions", numbers::MAX_POSITIONS),
        ("max_filter", numbers::MAX_FILTER),
        ("max_open_messages", numbers::MAX_OPEN_MESSAGES),
        ("max_message", numbers::MAX_MESSAGE),
        ("max_open_bytes", numbers::MAX_OPEN_BYTES),
        ("kept_messages", numbers::KEPT_MESSAGES),
        ("kept_message_bytes", numbers::KEPT_MESSAGE_BYTES),
        ("indexed_messages", numbers::INDEXED_MESSAGES),
        ("max_key", numbers::MAX_KEY),
        ("max_state_keys", numbers::MAX_STATE_KEYS),
        ("max_state_bytes", numbers::MAX_STATE_BYTES),
        ("max_view", numbers::MAX_VIEW),
        ("max_window", numbers::MAX_WINDOW as usize),
        ("max_members", numbers::MAX_MEMBERS),
        ("max_member_data", numbers::MAX_MEMBER_DATA),
        ("max_progress", numbers::MAX_PROGRESS as usize),
        ("min_grace", numbers::MIN_GRACE as usize),
        ("max_grace", numbers::MAX_GRACE as usize),
        ("max_runs", numbers::MAX_RUNS),
        ("kept_lost_runs", numbers::KEPT_LOST_RUNS),
        ("kept_runs", numbers::KEPT_RUNS),
        ("max_inputs", numbers::MAX_INPUTS),
        ("max_standbys", numbers::MAX_STANDBYS),
        ("min_lease", numbers::MIN_LEASE as usize),
        ("max_lease", numbers::MAX_LEASE as usize),
        ("max_signals", numbers::MAX_SIGNALS),
        ("reserved_signals", numbers::RESERVED_SIGNALS),
        ("max_own_signals", numbers::MAX_OWN_SIGNALS),
        ("max_signal_text", numbers::MAX_SIGNAL_TEXT),
        ("kept_signals", numbers::KEPT_SIGNALS),
        ("max_requests", numbers::MAX_REQUESTS),
        ("max_request_body", numbers::MAX_REQUEST_BODY),
        ("kept_requests", numbers::KEPT_REQUESTS),
        ("max_rules", numbers::MAX_RULES),
        ("max_triggers", numbers::MAX_TRIGGERS),
        ("max_jobs", numbers::MAX_JOBS),
        ("max_pulled", numbers::MAX_PULLED),
        ("departed_lease", numbers::DEPARTED_LEASE as usize),
        ("worker_silence", numbers::WORKER_SILENCE as usize),
        ("max_lasts", numbers::MAX_LASTS as usize),
        ("control_reserve", numbers::CONTROL_RESERVE),
        ("min_bulk_window", numbers::MIN_BULK_WINDOW as usize),
    ];
    let in_code = code(limits.iter().map(|(name, limit)| (*name, *limit as u64)));
    assert_eq!(in_code, entries(&registry, "limits", ""));
    let integer = |key: &str| registry[key].as_integer();
    assert_eq!(registry["alpn"].as_str().map(str::as_bytes), Some(numbers::ALPN));
    assert_eq!(integer("chunk_version"), Some(i64::from(numbers::CHUNK_VERSION)));
    assert_eq!(integer("compacted_version"), Some(i64::from(numbers::COMPACTED_VERSION)));
    assert_eq!(integer("fold_version"), Some(numbers::FOLD_VERSION as i64));
    assert_eq!(integer("snapshot_version"), Some(i64::from(numbers::SNAPSHOT_VERSION)));
    assert_eq!(integer("oldest_snapshot_version"), Some(i64::from(numbers::OLDEST_SNAPSHOT_VERSION)));
    let grease = table(&registry, "grease");
    let (base, step) = (&grease["base"], &grease["step"]);
    assert_eq!(*base, Value::Integer(numbers::grease(0) as i64));
    assert_eq!(*step, Value::Integer((numbers::grease(1) - numbers::grease(0)) as i64));
    assert!((0..10_000).all(|n| numbers::is_ignorable(numbers::grease(n))));
}

/// The second varint of a SUBSCRIBE body, which says how it starts.
fn start_number(start: Start) -> u64 {
    let mut body = Writer::new();
    Subscribe { id: 0, start, streams: vec![], kinds: vec![], window: None, folded: false }.put(&mut body);
    u64::from(body.as_slice()[1])
}

/// The number of a change in a `state.change` of the key `k` that expects nothing.
fn change_number(change: Change) -> u64 {
    let key = Key::new("k").expect("a key");
    u64::from(StateChange { key, expected: Expected::Any, change }.record(0).payload[3])
}

/// The number of a target in a signal, behind its id.
fn target_number(target: Target) -> u64 {
    let intent = if matches!(target, Target::Request(_)) { Intent::Approve } else { Intent::Cancel };
    let signal = Signal { id: SignalId([0; 16]), intent, target, lasts: 1, text: Bytes::new() };
    u64::from(signal.record(0, None).payload[16])
}

#[test]
fn enumerations_and_defaults_are_those_of_the_registry() {
    let registry = registry();
    let modes = [("attach", AttachMode::Attach), ("create", AttachMode::Create), ("create_new", AttachMode::CreateNew)];
    let modes = code(modes.map(|(name, mode)| (name, mode as u64)));
    assert_eq!(modes, entries(&registry, "attach_modes", ""));
    let starts = [
        ("earliest", Start::Earliest),
        ("latest", Start::Latest),
        ("seq", Start::Seq(0)),
        ("snapshot", Start::Snapshot),
        ("last", Start::Last(0)),
    ];
    assert_eq!(code(starts.map(|(name, start)| (name, start_number(start)))), entries(&registry, "starts", ""));
    let verdicts = [Verdict::Exact, Verdict::Snapshot, Verdict::Gap, Verdict::Gone];
    let verdicts = code(verdicts.map(|verdict| (verdict.as_str(), verdict as u64)));
    assert_eq!(verdicts, entries(&registry, "verdicts", ""));
    assert_eq!(code([("trimmed", numbers::GAP_TRIMMED)]), entries(&registry, "gap_reasons", ""));
    let statuses = code(Status::ALL.map(|status| (status.as_str(), status as u64)));
    assert_eq!(statuses, entries(&registry, "message_statuses", ""));
    macro_rules! words_are_those_of {
        ($($table:literal: $words:ident),+) => { $(
            let in_code = code($words::ALL.iter().map(|word| (word.as_str(), *word as u64)));
            assert_eq!(in_code, entries(&registry, $table, ""), $table);
        )+ };
    }
    words_are_those_of! {
        "departures": Departure, "run_modes": RunMode, "input_policies": InputPolicy, "resolutions": Resolution, "job_outcomes": JobOutcome,
        "signal_outcomes": SignalOutcome, "request_outcomes": RequestOutcome
    }
    let targets = [("run", Target::Run(RunId([0; 16]))), ("input", Target::Input(MessageId([0; 16])))];
    let targets = targets.into_iter().chain([("request", Target::Request(RequestId([0; 16])))]);
    assert_eq!(
        code(targets.map(|(name, target)| (name, target_number(target)))),
        entries(&registry, "signal_targets", "")
    );
    let changes = [
        ("put", Change::Put { value: Bytes::new(), lasts: 0 }),
        ("delete", Change::Delete),
        ("increment", Change::Increment(0)),
        ("merge", Change::Merge(Bytes::new())),
    ];
    let changes = code(changes.map(|(name, change)| (name, change_number(change))));
    assert_eq!(changes, entries(&registry, "state_changes", ""));
    let defaults =
        code([("bulk_window", numbers::DEFAULT_BULK_WINDOW), ("bulk_streams", numbers::DEFAULT_BULK_STREAMS)]);
    let stated = table(&registry, "parameters.HELLO").iter().filter_map(|(name, entry)| {
        Some((name.as_str(), u64::try_from(entry.get("default")?.as_integer()?).expect("not negative")))
    });
    assert_eq!(defaults, code(stated));
}
