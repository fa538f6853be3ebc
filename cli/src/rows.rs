//! Records as rows: JSON for scripts, a line for people.

use base64::Engine as _;
use mainstay_client::{
    Activity, Author, Kind, MessageEnd, MessageStart, NotifyDone, NotifyEmitted, NotifyRule, Payload, PresenceJoined,
    PresenceLeft, PresenceUpdated, ReadRecord, Record, RequestExpired, RequestOpened, RequestWithdrawn, RunConsumed,
    RunEnd, RunLost, RunStart, SessionConfigured, Signal, SignalExpired, SignalResolved, StateDeleted, StateExpired,
    StatePut, Target,
};
use serde_json::{Value, json};

use crate::output::time;

/// A record as a JSON row.
pub(crate) fn row(record: &ReadRecord<'_>) -> Value {
    let ReadRecord { seq, time, author, stream, record } = record;
    row_of(*seq, *time, author, stream, record)
}

/// The same, of its parts.
pub(crate) fn row_of(seq: u64, at: u64, author: &Author, stream: &str, record: &Record) -> Value {
    let mut row = json!({
        "event": "record",
        "seq": seq,
        "time": time(at),
        "stream": stream,
        "kind": record.kind.name().map_or_else(|| record.kind.0.to_string(), str::to_owned),
        "author": author.to_string(),
    });
    if let Some(id) = record.message {
        row["message"] = json!(id.to_string());
    }
    if let Some(id) = record.run {
        row["run"] = json!(id.to_string());
    }
    if !fields(record, &mut row) {
        bytes(&mut row, "data", &record.payload);
    }
    row
}

/// What a payload says, field by field. False for one that is bytes alone.
fn fields(record: &Record, row: &mut Value) -> bool {
    match record.kind {
        Kind::MESSAGE_START => MessageStart::of(record).is_ok_and(|start| {
            row["role"] = json!(start.role.as_str());
            row["content_type"] = json!(start.content_type.as_str());
            true
        }),
        Kind::MESSAGE_END => MessageEnd::of(record).is_ok_and(|end| {
            row["status"] = json!(end.status.as_str());
            row["detail"] = json!(end.detail.as_str());
            true
        }),
        Kind::STATE_PUT => StatePut::of(record).is_ok_and(|put| {
            row["key"] = json!(put.key.as_str());
            bytes(row, "value", &put.value);
            if put.lasts > 0 {
                row["lasts_ms"] = json!(put.lasts);
            }
            true
        }),
        Kind::PRESENCE_JOINED => PresenceJoined::of(record).is_ok_and(|joined| {
            row["name"] = json!(joined.name.as_str());
            row["grace_ms"] = json!(joined.grace);
            activity(row, &joined.activity);
            true
        }),
        Kind::PRESENCE_UPDATED => PresenceUpdated::of(record).is_ok_and(|updated| {
            activity(row, &updated.activity);
            true
        }),
        Kind::PRESENCE_LEFT => PresenceLeft::of(record).is_ok_and(|left| {
            row["member"] = json!(left.member.to_string());
            row["generation"] = json!(left.generation);
            row["reason"] = json!(left.reason.as_str());
            true
        }),
        Kind::SESSION_CONFIGURED => SessionConfigured::of(record).is_ok_and(|configured| {
            row["runs"] = json!(configured.runs.as_str());
            row["inputs"] = json!(configured.inputs.as_str());
            true
        }),
        Kind::RUN_START => RunStart::of(record).is_ok_and(|start| {
            row["lease_ms"] = json!(start.lease);
            if let Some(input) = start.input {
                row["input"] = json!(input.to_string());
            }
            if let Some(lost) = start.lost {
                row["lost_epoch"] = json!(lost);
            }
            true
        }),
        Kind::RUN_END => RunEnd::of(record).is_ok_and(|end| {
            row["status"] = json!(end.status.as_str());
            row["detail"] = json!(end.detail.as_str());
            true
        }),
        Kind::RUN_LOST => RunLost::of(record).is_ok_and(|lost| {
            row["epoch"] = json!(lost.epoch);
            true
        }),
        Kind::RUN_CONSUMED => RunConsumed::of(record).is_ok_and(|consumed| {
            row["consumed_through"] = json!(consumed.through);
            true
        }),
        Kind::SIGNAL_RESOLVED => SignalResolved::of(record).is_ok_and(|resolved| {
            row["signal"] = json!(resolved.signal.to_string());
            row["outcome"] = json!(resolved.outcome.as_str());
            row["detail"] = json!(resolved.detail.as_str());
            true
        }),
        Kind::SIGNAL_EXPIRED => SignalExpired::of(record).is_ok_and(|expired| {
            row["signal"] = json!(expired.signal.to_string());
            true
        }),
        Kind::REQUEST_OPENED => RequestOpened::of(record).is_ok_and(|opened| {
            row["request"] = json!(opened.request.to_string());
            row["needs"] = json!(opened.needs.as_str());
            row["lasts_ms"] = json!(opened.lasts);
            bytes(row, "body", &opened.body);
            true
        }),
        Kind::REQUEST_WITHDRAWN => RequestWithdrawn::of(record).is_ok_and(|withdrawn| {
            row["request"] = json!(withdrawn.request.to_string());
            true
        }),
        Kind::REQUEST_EXPIRED => RequestExpired::of(record).is_ok_and(|expired| {
            row["request"] = json!(expired.request.to_string());
            true
        }),
        Kind::NOTIFY_RULE => NotifyRule::of(record).is_ok_and(|rule| {
            row["rule"] = json!(rule.name.as_str());
            row["principal"] = json!(rule.principal.as_str());
            row["on"] = rule.triggers.kinds().iter().map(|kind| json!(kind.name())).collect();
            row["delay_ms"] = json!(rule.delay);
            true
        }),
        Kind::NOTIFY_EMITTED => NotifyEmitted::of(record).is_ok_and(|emitted| {
            row["job"] = json!(emitted.job);
            row["rule"] = json!(emitted.rule.as_str());
            true
        }),
        Kind::NOTIFY_DONE => NotifyDone::of(record).is_ok_and(|done| {
            row["job"] = json!(done.job);
            row["rule"] = json!(done.rule.as_str());
            row["outcome"] = json!(done.outcome.as_str());
            row["detail"] = json!(done.detail.as_str());
            true
        }),
        Kind::STATE_DELETED => StateDeleted::of(record).is_ok_and(|deleted| {
            row["key"] = json!(deleted.key.as_str());
            true
        }),
        Kind::STATE_EXPIRED => StateExpired::of(record).is_ok_and(|expired| {
            row["key"] = json!(expired.key.as_str());
            true
        }),
        _ => Signal::of(record).is_ok_and(|signal| {
            self::signal(row, &signal);
            true
        }),
    }
}

/// What a signal says, beside its intent, which is its kind.
fn signal(row: &mut Value, signal: &Signal) {
    row["signal"] = json!(signal.id.to_string());
    let (name, id) = match signal.target {
        Target::Run(id) => ("run", id.to_string()),
        Target::Input(id) => ("input", id.to_string()),
        Target::Request(id) => ("request", id.to_string()),
    };
    row[name] = json!(id);
    row["lasts_ms"] = json!(signal.lasts);
    bytes(row, "text", &signal.text);
}

fn activity(row: &mut Value, activity: &Activity) {
    row["status"] = json!(activity.status.as_str());
    if let Some(percent) = activity.progress {
        row["progress"] = json!(percent);
    }
    if !activity.data.is_empty() {
        bytes(row, "data", &activity.data);
    }
}

/// A record for people: data as it is, anything else behind its kind.
pub(crate) fn line(record: &Record) -> Vec<u8> {
    if record.kind == Kind::DATA {
        return record.payload.to_vec();
    }
    let kind = record.kind.name().unwrap_or("unknown");
    let mut said = json!({});
    let text = match fields(record, &mut said) {
        true => {
            let members = said.as_object().into_iter().flatten();
            let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            members.map(|(name, value)| format!(" {name}={}", text(value))).collect()
        }
        false if record.payload.is_empty() => String::new(),
        false => format!(" {}", String::from_utf8_lossy(&record.payload)),
    };
    format!("[{kind}]{text}").into_bytes()
}

/// Bytes as text under `name`, or in base64 under `name_base64` where they are none.
pub(crate) fn bytes(row: &mut Value, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => row[name] = json!(text),
        Err(_) => row[format!("{name}_base64")] = json!(base64::engine::general_purpose::STANDARD.encode(bytes)),
    }
}
