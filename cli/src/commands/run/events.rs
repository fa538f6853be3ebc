//! What a process says in JSON lines: AG-UI events as records.

use mainstay_client::{
    Detail, Doing, Key, Label, MessageAppend, MessageEnd, MessageId, MessageStart, Payload, Record, RequestId,
    RequestOpened, RunId, StatePut, Status, StreamId,
};
use serde_json::Value;

/// Media type of a tool's call (spec MSG-6).
const TOOL_CALL: &str = "application/vnd.ag-ui.tool-call+json";

/// What a line says.
#[derive(Debug, Default)]
pub(crate) struct Said {
    pub(crate) records: Vec<Record>,
    pub(crate) doing: Option<Doing>,
}

/// Reads one line. `None` if it is no event of those that mean something here.
pub(crate) fn read(line: &[u8], run: RunId, stream: StreamId, content_type: &str) -> Option<Said> {
    let event: Value = serde_json::from_slice(line).ok()?;
    let field = |name: &str| event.get(name).and_then(Value::as_str);
    let doing = |status: &str| Doing::new(status).ok();
    let one = |record: Record| Said { records: vec![record], doing: None };
    let message = |kind: &str, id: &str, record: Record| Record { message: Some(id_of(run, kind, id)), ..record };
    let start = |role: &str, content_type: &str| {
        Some(
            stream.record(&MessageStart { role: Label::new(role).ok()?, content_type: Label::new(content_type).ok()? }),
        )
    };
    let part = || Some(stream.record(&MessageAppend(field("delta")?.to_owned().into())));
    let end = || stream.record(&MessageEnd { status: Status::Complete, detail: Detail::default() });
    Some(match field("type")? {
        "TEXT_MESSAGE_START" => {
            let role = field("role").unwrap_or("assistant");
            if role == "user" {
                // It would be an input of its own.
                return None;
            }
            let begun = message("text", field("messageId")?, start(role, content_type)?);
            Said { doing: doing("streaming"), ..one(begun) }
        }
        "TEXT_MESSAGE_CONTENT" => one(message("text", field("messageId")?, part()?)),
        "TEXT_MESSAGE_END" => one(message("text", field("messageId")?, end())),
        "REASONING_MESSAGE_START" => {
            let begun = message("reasoning", field("messageId")?, start("reasoning", content_type)?);
            Said { doing: doing("thinking"), ..one(begun) }
        }
        "REASONING_MESSAGE_CONTENT" => one(message("reasoning", field("messageId")?, part()?)),
        "REASONING_MESSAGE_END" => one(message("reasoning", field("messageId")?, end())),
        "TOOL_CALL_START" => {
            let (id, name) = (field("toolCallId")?, field("toolCallName")?);
            let mut begun = message("call", id, start("assistant", TOOL_CALL)?);
            begun.headers = headers(&[("tool-call-id", id), ("tool-call-name", name)]);
            Said { doing: doing(&format!("tool:{name}")), ..one(begun) }
        }
        "TOOL_CALL_ARGS" => one(message("call", field("toolCallId")?, part()?)),
        "TOOL_CALL_END" => one(message("call", field("toolCallId")?, end())),
        "TOOL_CALL_RESULT" => {
            let id = field("toolCallId")?;
            let text = field("content")?.to_owned();
            let mut begun = start("tool", content_type)?;
            begun.headers = headers(&[("tool-call-id", id)]);
            let records = [begun, stream.record(&MessageAppend(text.into())), end()];
            let records = records.into_iter().map(|record| message("result", id, record)).collect();
            Said { records, doing: doing("thinking") }
        }
        "CUSTOM" => custom(field("name")?, event.get("value")?, stream)?,
        _ => return None,
    })
}

/// What AG-UI has no event for.
fn custom(name: &str, value: &Value, stream: StreamId) -> Option<Said> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let milliseconds = |value: &Value| Some((value.as_f64()?.clamp(0.0, 1e12) * 1000.0) as u64);
    Some(match name {
        "state.put" => {
            let key = Key::new(value.get("key")?.as_str()?).ok()?;
            let lasts = value.get("lasts").and_then(milliseconds).unwrap_or(0);
            let put = StatePut { key, value: value.get("value")?.to_string().into(), lasts };
            Said { records: vec![stream.record(&put)], doing: None }
        }
        "status" => Said { records: Vec::new(), doing: Some(Doing::new(value.as_str()?).ok()?) },
        "request" => {
            let opened = RequestOpened {
                request: RequestId(rand::random()),
                needs: Label::new(value.get("needs")?.as_str()?).ok()?,
                lasts: value.get("lasts").and_then(milliseconds).unwrap_or(3_600_000),
                body: text(value.get("body")?).into(),
            };
            Said { records: vec![stream.record(&opened)], doing: Doing::new("waiting").ok() }
        }
        _ => return None,
    })
}

fn headers(pairs: &[(&str, &str)]) -> Vec<(bytes::Bytes, bytes::Bytes)> {
    pairs.iter().map(|(name, value)| (name.to_string().into(), value.to_string().into())).collect()
}

/// The id of a message that the process calls so: the same for whoever goes on with the run.
fn id_of(run: RunId, kind: &str, id: &str) -> MessageId {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&run.0).update(kind.as_bytes()).update(&[0]).update(id.as_bytes());
    let mut short = [0; 16];
    hasher.finalize_xof().fill(&mut short);
    MessageId(short)
}

/// A record of a line that is no event.
pub(crate) fn bare(stream: StreamId, line: &[u8]) -> Record {
    stream.data(line.to_vec())
}

/// An input as a line for the process.
pub(crate) fn input(message: &mainstay_client::Message) -> Vec<u8> {
    let event = serde_json::json!({
        "type": "input", "messageId": message.id.to_string(), "author": message.author.to_string(),
        "text": String::from_utf8_lossy(&message.text),
    });
    event.to_string().into_bytes()
}

/// The same, of which only the text is known.
pub(crate) fn input_text(text: &[u8]) -> Vec<u8> {
    serde_json::json!({"type": "input", "text": String::from_utf8_lossy(text)}).to_string().into_bytes()
}

/// A signal as a line for the process.
pub(crate) fn signal(signal: &mainstay_client::Signal) -> Vec<u8> {
    let mut event = serde_json::json!({
        "type": "signal", "signal": signal.id.to_string(), "intent": signal.intent.as_str(),
        "text": String::from_utf8_lossy(&signal.text),
    });
    if let mainstay_client::Target::Request(request) = signal.target {
        event["request"] = serde_json::json!(request.to_string());
    }
    event.to_string().into_bytes()
}

/// A payload that a record of the run has.
pub(crate) fn payload<P: Payload>(record: &Record) -> Option<P> {
    P::of(record).ok()
}
