//! `tail --fold`: the conversation as it is now, then live.

use std::time::Duration;

use mainstay_client::{
    Client, ClientError, Folded, Kind, LiveView, Message, MessageAppend, MessageId, OpenRequest, PathEvent, Payload,
    Status, Update,
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

use crate::args;
use crate::data::{PATH_CHANGED, patiently};
use crate::failure::Failure;
use crate::output::{Output, Screen, time};
use crate::rows;
use crate::serve::signalled;

/// What is shown.
struct Conversation {
    screen: Screen,
    /// The message whose text ends the last line, for people.
    line_of: Option<MessageId>,
    /// Everything below was shown: people do not need it again when the view is read anew.
    next: u64,
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
    let mut shown = Conversation { screen: Screen::new(output), line_of: None, next: 0 };
    let idle = args.until_idle.map(Duration::from_millis);
    let mut idle_since: Option<Instant> = None;
    let (mut connection, mut paths) = (client.connection(), client.path_changes());
    loop {
        let deadline = idle.zip(idle_since).map(|(idle, since)| since + idle);
        let update = tokio::select! {
            // What became of the connection before what comes over it.
            biased;
            Some(event) = paths.next() => {
                match event {
                    PathEvent::PathChanged => output.notice("path_changed", PATH_CHANGED)?,
                    PathEvent::Lost | PathEvent::Moved => idle_since = None,
                    _ => {}
                }
                continue;
            }
            Some(connected) = connection.changed() => {
                // A path that was in doubt may turn out to work: then nothing is resumed.
                idle_since = connected.then(Instant::now);
                continue;
            }
            () = &mut stop => break,
            () = async { sleep_until(deadline.unwrap_or_else(Instant::now)).await }, if deadline.is_some() => {
                // A server that is dead is quiet too: at the end of the idle time it has to answer.
                let tail = tokio::select! {
                    attached = client.session(&args.session)?.attach() => attached?.info().tail,
                    () = &mut stop => break,
                };
                if tail <= view.view().next() {
                    break;
                }
                idle_since = Some(Instant::now());
                continue;
            }
            update = view.next() => update,
        };
        let Some(update) = update else { break };
        let mut ended = false;
        match update? {
            Update::Started => shown.whole(&view),
            Update::Record(folded) => {
                shown.folded(&view, &folded)?;
                idle_since = idle_since.map(|_| Instant::now());
            }
            Update::CaughtUp { tail } => {
                shown.screen.json_only(&json!({"event": "caught_up", "tail": tail}));
                idle_since = Some(Instant::now());
            }
            Update::Resumed => {
                shown.screen.json_only(&json!({"event": "reconnected", "next": view.view().next()}));
                idle_since = Some(Instant::now());
            }
            Update::Ended => ended = true,
            _ => {}
        }
        shown.next = view.view().next();
        tokio::select! {
            result = shown.screen.show() => result?,
            () = &mut stop => return Ok(()),
        }
        if ended {
            break;
        }
    }
    shown.end_line();
    shown.screen.show().await
}

impl Conversation {
    /// Everything that the view holds, in the order in which it began.
    fn whole(&mut self, view: &LiveView) {
        self.end_line();
        let view = view.view();
        self.screen.json_only(&json!({"event": "view", "next": view.next(), "hash": view.hash().to_string()}));
        let messages = view.messages();
        for older in messages.index() {
            self.screen.json_only(&json!({
                "event": "message", "id": older.id.to_string(), "status": older.status.as_str(),
                "through": older.through, "length": older.len,
            }));
        }
        let mut known: Vec<&Message> = messages.finished().chain(messages.open()).collect();
        known.sort_by_key(|message| message.start);
        let is_new = |seq: u64| self.screen.is_json() || seq >= self.next;
        let requests: Vec<&OpenRequest> = view.signals().requests().iter().filter(|of| is_new(of.seq)).collect();
        known.retain(|message| is_new(message.through));
        known.into_iter().for_each(|message| self.message(message));
        self.end_line();
        requests.into_iter().for_each(|request| self.request(request));
    }

    /// Something that waits for an answer.
    fn request(&mut self, request: &OpenRequest) {
        let mut event = json!({
            "event": "request", "kind": "request.opened", "seq": request.seq, "author": request.author.to_string(),
            "request": request.id.to_string(), "needs": request.needs.as_str(), "expires": time(request.expires),
        });
        rows::bytes(&mut event, "body", &request.body);
        let (id, needs, body) = (request.id, &request.needs, String::from_utf8_lossy(&request.body));
        self.screen.event(&event, || format!("[request.opened] request={id} needs={needs} body={body}"));
    }

    fn message(&mut self, message: &Message) {
        if self.screen.is_json() {
            return self.screen.json_only(&row(message));
        }
        self.speak(message, &message.text);
        self.closed(message);
    }

    /// Text of a message behind what is on its line, or on a new line of its own.
    fn speak(&mut self, message: &Message, text: &[u8]) {
        if self.line_of != Some(message.id) {
            self.end_line();
            self.screen.raw(format!("{}: ", message.role).as_bytes());
            self.line_of = Some(message.id);
        }
        self.screen.raw(text);
    }

    /// What is said about a message that is finished.
    fn closed(&mut self, message: &Message) {
        match message.status {
            Status::Open => {}
            Status::Complete => self.end_line(),
            status => {
                self.screen.raw(format!(" [{}]", status.as_str()).as_bytes());
                self.end_line();
            }
        }
    }

    fn ended(&mut self, message: &Message, seq: u64) {
        let (id, status) = (message.id.to_string(), message.status.as_str());
        self.screen.json_only(&json!({"event": "end", "id": id, "status": status, "through": seq}));
        if self.line_of == Some(message.id) || message.status != Status::Complete {
            self.speak(message, b"");
            self.closed(message);
        }
    }

    /// A run was lost, taken over or ended: what it was writing is interrupted, or goes on.
    fn of_runs(&mut self, view: &LiveView, seq: u64) {
        let messages = view.view().messages();
        for message in messages.open().iter().chain(messages.finished()).filter(|message| message.through == seq) {
            if message.status == Status::Open {
                let event = json!({"event": "reopened", "id": message.id.to_string(), "through": seq});
                self.screen.json_only(&event);
            } else {
                self.ended(message, seq);
            }
        }
    }

    fn end_line(&mut self) {
        if self.line_of.take().is_some() {
            self.screen.raw(b"\n");
        }
    }

    fn folded(&mut self, view: &LiveView, folded: &Folded) -> Result<(), Failure> {
        let record = &folded.record;
        if record.kind == Kind::SESSION_CLOSED {
            // It finishes what was open.
            for message in view.view().messages().finished().filter(|message| message.through == folded.seq) {
                self.ended(message, folded.seq);
            }
            self.end_line();
            self.screen.event(&json!({"event": "closed", "seq": folded.seq}), || "[session closed]".to_owned());
            return Ok(());
        }
        if matches!(record.kind, Kind::RUN_START | Kind::RUN_LOST | Kind::RUN_END) {
            self.of_runs(view, folded.seq);
            return Ok(());
        }
        let family = record.kind.name().and_then(|name| name.split('.').next());
        if let Some(family @ ("signal" | "request")) = family {
            self.end_line();
            let mut event = rows::row_of(folded.seq, folded.time, &folded.author, "", record);
            event["event"] = json!(family);
            event.as_object_mut().and_then(|event| event.remove("stream"));
            self.screen.event(&event, || String::from_utf8_lossy(&rows::line(record)).into_owned());
            return Ok(());
        }
        let Some(message) = record.message.and_then(|id| view.view().messages().get(id)) else { return Ok(()) };
        match record.kind {
            Kind::MESSAGE_START if self.screen.is_json() => self.screen.json_only(&row(message)),
            Kind::MESSAGE_START => self.speak(message, b""),
            Kind::MESSAGE_APPEND => {
                let part = MessageAppend::of(record).map_err(ClientError::from)?.0;
                if self.screen.is_json() {
                    let mut event = json!({"event": "append", "id": message.id.to_string(), "through": folded.seq});
                    rows::bytes(&mut event, "text", &part);
                    self.screen.json_only(&event);
                } else {
                    self.speak(message, &part);
                }
            }
            Kind::MESSAGE_REPLACE => {
                self.end_line();
                self.message(message);
            }
            Kind::MESSAGE_END => self.ended(message, folded.seq),
            _ => {}
        }
        Ok(())
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
