//! `tail --fold`: the conversation as it is now, then live.

use std::time::Duration;

use mainstay_client::{
    Client, ClientError, Folded, Kind, LiveView, Message, MessageAppend, MessageId, Payload, Status, Update,
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

use super::serve::signalled;
use crate::args;
use crate::data::patiently;
use crate::failure::Failure;
use crate::output::{Output, room, time};
use crate::rows;

/// What is on the screen.
struct Screen {
    output: Output,
    /// The message whose text ends the last line, for people.
    line_of: Option<MessageId>,
}

pub(crate) async fn follow(client: &Client, args: &args::Tail, output: Output) -> Result<(), Failure> {
    let stop = signalled();
    tokio::pin!(stop);
    let attaching = client.session(&args.session)?.wait();
    let live = async {
        match args.window {
            Some(window) => attaching.live_rolled_up(Duration::from_millis(window)).await,
            None => attaching.live().await,
        }
    };
    let mut view = tokio::select! {
        view = patiently(client, &args.session, output, live) => view?,
        () = &mut stop => return Ok(()),
    };
    let mut screen = Screen { output, line_of: None };
    let idle = args.until_idle.map(Duration::from_millis);
    let mut idle_since: Option<Instant> = None;
    let mut connection = client.connection();
    loop {
        let deadline = idle.zip(idle_since).map(|(idle, since)| since + idle);
        let update = tokio::select! {
            update = view.next() => update,
            () = async { sleep_until(deadline.unwrap_or_else(Instant::now)).await }, if deadline.is_some() => break,
            Some(connected) = connection.changed() => {
                if !connected {
                    idle_since = None;
                    screen.end_line()?;
                    output.warning("UNAVAILABLE", "the server is lost; trying again")?;
                }
                continue;
            }
            () = &mut stop => break,
        };
        let Some(update) = update else { break };
        tokio::select! {
            ready = room() => ready?,
            () = &mut stop => break,
        }
        match update? {
            Update::Started => screen.whole(&view)?,
            Update::Record(folded) => {
                screen.folded(&view, &folded)?;
                idle_since = idle_since.map(|_| Instant::now());
            }
            Update::CaughtUp { tail } => {
                output.json_only(&json!({"event": "caught_up", "tail": tail}))?;
                idle_since = Some(Instant::now());
            }
            Update::Resumed => {
                output.json_only(&json!({"event": "reconnected", "next": view.view().next()}))?;
                idle_since = Some(Instant::now());
            }
            Update::Ended => break,
            _ => {}
        }
    }
    screen.end_line()
}

impl Screen {
    /// Everything that the view holds, in the order in which it began.
    fn whole(&mut self, view: &LiveView) -> Result<(), Failure> {
        let view = view.view();
        self.output.json_only(&json!({"event": "view", "next": view.next(), "hash": view.hash().to_string()}))?;
        let messages = view.messages();
        for older in messages.index() {
            self.output.json_only(&json!({
                "event": "message", "id": older.id.to_string(), "status": older.status.as_str(),
                "through": older.through, "length": older.len,
            }))?;
        }
        let mut shown: Vec<&Message> = messages.finished().chain(messages.open()).collect();
        shown.sort_by_key(|message| message.start);
        shown.into_iter().try_for_each(|message| self.message(message))
    }

    fn message(&mut self, message: &Message) -> Result<(), Failure> {
        if self.output.is_json() {
            return self.output.json_only(&row(message));
        }
        self.speak(message, &message.text)?;
        self.closed(message)
    }

    /// Text of a message behind what is on its line, or on a new line of its own.
    fn speak(&mut self, message: &Message, text: &[u8]) -> Result<(), Failure> {
        if self.line_of != Some(message.id) {
            self.end_line()?;
            self.output.text(&format!("{}: ", message.role))?;
            self.line_of = Some(message.id);
        }
        self.output.raw(text)
    }

    /// What is said about a message that is finished.
    fn closed(&mut self, message: &Message) -> Result<(), Failure> {
        match message.status {
            Status::Open => Ok(()),
            Status::Complete => self.end_line(),
            status => {
                self.output.text(&format!(" [{}]", status.as_str()))?;
                self.end_line()
            }
        }
    }

    fn end_line(&mut self) -> Result<(), Failure> {
        match self.line_of.take() {
            Some(_) => self.output.text("\n"),
            None => Ok(()),
        }
    }

    fn folded(&mut self, view: &LiveView, folded: &Folded) -> Result<(), Failure> {
        let record = &folded.record;
        if record.kind == Kind::SESSION_CLOSED {
            self.end_line()?;
            return self.output.event(&json!({"event": "closed", "seq": folded.seq}), || "[session closed]".to_owned());
        }
        let Some(message) = record.message.and_then(|id| view.view().messages().get(id)) else { return Ok(()) };
        let id = message.id.to_string();
        match record.kind {
            Kind::MESSAGE_START if self.output.is_json() => self.output.json_only(&row(message)),
            Kind::MESSAGE_START => self.speak(message, b""),
            Kind::MESSAGE_APPEND => {
                let part = MessageAppend::of(record).map_err(ClientError::from)?.0;
                if self.output.is_json() {
                    let mut event = json!({"event": "append", "id": id, "through": folded.seq});
                    rows::bytes(&mut event, "text", &part);
                    return self.output.json_only(&event);
                }
                self.speak(message, &part)
            }
            Kind::MESSAGE_REPLACE => {
                self.end_line()?;
                self.message(message)
            }
            Kind::MESSAGE_END => {
                let status = message.status.as_str();
                self.output.json_only(&json!({"event": "end", "id": id, "status": status, "through": folded.seq}))?;
                if self.line_of == Some(message.id) || message.status != Status::Complete {
                    self.speak(message, b"")?;
                    self.closed(message)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// A message as it is now.
fn row(message: &Message) -> Value {
    let mut row = json!({
        "event": "message",
        "id": message.id.to_string(),
        "status": message.status.as_str(),
        "role": message.role.as_str(),
        "content_type": message.content_type.as_str(),
        "author": message.author.to_string(),
        "time": time(message.time),
        "start": message.start,
        "through": message.through,
    });
    rows::bytes(&mut row, "text", &message.text);
    row
}
