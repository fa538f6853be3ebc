//! `append`: standard input to a session, one record per line.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use mainstay_client::{
    Client, ClientError, Config, EntryState, Item, MessageAppend, MessageEnd, MessageId, MessageStart, Outbox,
    OutboxEntry, Payload, Producer, Record, Status, Ticket,
};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader, Stdin};
use tokio::sync::{mpsc, oneshot};

use super::outbox;
use crate::args;
use crate::data::{patiently, with_client};
use crate::failure::Failure;
use crate::output::{Output, room};
use crate::serve::signalled;

/// Lines on their way that the printing task may lag behind.
const LAG: usize = 64 * 1024;

pub(crate) async fn run(args: args::Append, output: Output) -> Result<(), Failure> {
    if let Some(dir) = &args.outbox {
        return kept(dir, &args, output).await;
    }
    let acked = AtomicU64::new(0);
    with_client(args.connect.connect.as_deref(), Config::default(), output, async |client| {
        tokio::select! {
            result = append(client, &args, &acked, output) => result,
            () = signalled() => {
                let count = acked.load(Ordering::Relaxed);
                let message =
                    format!("interrupted after {count} lines were acknowledged; those behind them may be stored or not");
                Err(Failure::failed("INTERRUPTED", message))
            }
        }
    })
    .await
}

async fn append(client: &Client, args: &args::Append, acked: &AtomicU64, output: Output) -> Result<(), Failure> {
    let attaching = client.session(&args.session)?.create();
    let session = patiently(client, &args.session, output, attaching.attach()).await?;
    let stream = if args.stream == "main" { session.main() } else { session.stream(&args.stream).await? };
    let name = args.producer.clone().unwrap_or_else(|| format!("append-{:032x}", rand::random::<u128>()));
    let producer = session.producer(&name).await?;
    let (tickets, printing) = mpsc::channel(LAG);
    let reading = async {
        let tickets = tickets;
        let mut input = BufReader::with_capacity(64 * 1024, tokio::io::stdin());
        let mut number = 0u64;
        loop {
            let Some(line) = next_line(&mut input).await? else { return Ok::<_, Failure>(()) };
            let (ticket, message) = match &args.role {
                Some(role) => {
                    let id = MessageId(rand::random());
                    let batch = message(id, role, line)?.map(|record| stream.place(record));
                    (producer.append_batch(&batch).await?, Some(id))
                }
                None => (producer.append(stream, line).await?, None),
            };
            if tickets.send((number, ticket, message)).await.is_err() {
                // Printing has failed; its error is the one to tell.
                return Ok(());
            }
            number += 1;
        }
    };
    let mut reading = Some(Box::pin(reading));
    let printing = print(printing, acked, output);
    tokio::pin!(printing);
    let mut ended = None;
    let (first, last) = loop {
        let read = async {
            match &mut reading {
                Some(reading) => reading.as_mut().await,
                None => core::future::pending().await,
            }
        };
        tokio::select! {
            result = read => {
                reading = None;
                result?;
            }
            printed = &mut printing => match (printed, ended) {
                (Ok(span), None) => break span,
                (Ok(_), Some(error)) => return Err(error),
                (Err(failure), _) => return Err(failure),
            },
            // Told at once, without waiting for more input; but first what is known of each line that was read.
            error = producer.ended(), if ended.is_none() => {
                reading = None;
                ended = Some(Failure::from(error));
            }
            result = trouble(&producer, output) => return result,
        }
    };
    output.text(&match last {
        Some(last) => format!("appended {} records to {}, seqs {}..={last}\n", first.1, args.session, first.0),
        None => "nothing to append\n".to_owned(),
    })
}

/// A line without its end; `None` behind the last one.
async fn next_line(input: &mut BufReader<Stdin>) -> Result<Option<Vec<u8>>, Failure> {
    let mut line = Vec::new();
    let read = input.read_until(b'\n', &mut line).await;
    if read.map_err(|error| Failure::io("standard input", &error))? == 0 {
        return Ok(None);
    }
    line.pop_if(|last| *last == b'\n');
    Ok(Some(line))
}

/// Lines that are put on the disk together at most: an entry each, and a write for all.
const TOGETHER: usize = 256;
/// Bytes of lines that are put on the disk together.
const TOGETHER_BYTES: usize = 256 * 1024;

/// The same through an outbox.
async fn kept(dir: &Path, args: &args::Append, output: Output) -> Result<(), Failure> {
    let (held, before) = outbox::open(dir, &args.session, output).await?;
    let mut config = Config::default();
    // Until standard input ends whatever is read is kept, and that is enough.
    config.give_up_after = None;
    let queued = AtomicU64::new(0);
    let result = with_client(args.connect.connect.as_deref(), config, output, async |client| {
        let (entries, printing) = mpsc::channel(LAG);
        let (closed, closing) = oneshot::channel::<()>();
        let reading = async {
            let result = read(&held, args, &queued, entries, output).await;
            drop(closed);
            result
        };
        let of_before = async {
            let mut states = Vec::new();
            for kept in before.iter().filter(|kept| kept.run.is_none()) {
                states.push(kept.entry.settled().await);
                told(&held, &kept.entry, &json!({"line": null}), output).await?;
            }
            Ok(states)
        };
        let work = async {
            let ((), mut states, before) = tokio::try_join!(reading, print_kept(&held, printing, output), of_before)?;
            states.extend(before);
            Ok(states)
        };
        let attaching = client.session(&args.session)?.create();
        outbox::deliver(client, attaching, &held, work, async { drop(closing.await) }).await
    })
    .await;
    let states = result?;
    outbox::unstored(&states)?;
    output.text(&match queued.load(Ordering::Relaxed) {
        0 => "nothing to append\n".to_owned(),
        count => format!("appended {count} entries to {}\n", args.session),
    })
}

/// Lines of standard input, queued as they come.
async fn read(
    outbox: &Outbox,
    args: &args::Append,
    queued: &AtomicU64,
    entries: mpsc::Sender<(u64, OutboxEntry)>,
    output: Output,
) -> Result<(), Failure> {
    let mut input = BufReader::with_capacity(64 * 1024, tokio::io::stdin());
    let mut number = 0;
    loop {
        let (mut items, mut bytes, mut ended) = (Vec::new(), 0, false);
        while items.is_empty()
            || (items.len() < TOGETHER && bytes < TOGETHER_BYTES && input.buffer().contains(&b'\n') && !ended)
        {
            let Some(line) = next_line(&mut input).await? else {
                ended = true;
                break;
            };
            bytes += line.len();
            let item = match &args.role {
                Some(role) => Item::records(&args.stream, &message(MessageId(rand::random()), role, line)?),
                None => Item::records(&args.stream, &[Record::data(0, line)]),
            }?;
            items.push(match args.valid_for {
                Some(seconds) => item.valid_until(outbox::until(seconds)),
                None => item,
            });
        }
        if !items.is_empty() {
            outbox.room(items.len()).await;
            for entry in outbox.queue_all(items, &[]).await? {
                outbox::tell(&entry, &json!({"line": number}), output)?;
                queued.fetch_add(1, Ordering::Relaxed);
                if entries.send((number, entry)).await.is_err() {
                    // Printing has failed; its error is the one to tell.
                    return Ok(());
                }
                number += 1;
            }
        }
        if ended {
            return Ok(());
        }
    }
}

/// Tells what became of an entry. What was given up need not be kept then.
async fn told(outbox: &Outbox, entry: &OutboxEntry, more: &serde_json::Value, output: Output) -> Result<(), Failure> {
    outbox::tell(entry, more, output)?;
    match entry.state() {
        EntryState::Rejected { .. } | EntryState::Expired => Ok(outbox.dismiss(&[entry.number()]).await?),
        _ => Ok(()),
    }
}

/// Tells what became of each line, in order.
async fn print_kept(
    outbox: &Outbox,
    mut entries: mpsc::Receiver<(u64, OutboxEntry)>,
    output: Output,
) -> Result<Vec<EntryState>, Failure> {
    let mut states = Vec::new();
    while let Some((line, entry)) = entries.recv().await {
        states.push(entry.settled().await);
        if output.is_json() {
            room().await?;
        }
        told(outbox, &entry, &json!({"line": line}), output).await?;
    }
    Ok(states)
}

/// A whole message, as one batch.
fn message(id: MessageId, role: &str, text: Vec<u8>) -> Result<[Record; 3], Failure> {
    let label = |text| mainstay_client::Label::new(text).map_err(|error| Failure::from(ClientError::from(error)));
    let start = MessageStart { role: label(role)?, content_type: label("text/plain")? };
    let end = MessageEnd { status: Status::Complete, detail: Default::default() };
    let records = [start.record(0), MessageAppend(text.into()).record(0), end.record(0)];
    Ok(records.map(|record| Record { message: Some(id), ..record }))
}

/// Tells of refusals that are being retried.
async fn trouble(producer: &Producer, output: Output) -> Result<(), Failure> {
    loop {
        let error = producer.trouble().await;
        output.warning(&error.name(), &format!("{error}; trying again"))?;
    }
}

/// A line on its way, and the message that it is.
type Sent = (u64, Ticket, Option<MessageId>);

type Span = ((u64, u64), Option<u64>);

/// Prints acks in order. Returns the first seq, the number of records, and the last seq.
async fn print(mut tickets: mpsc::Receiver<Sent>, acked: &AtomicU64, output: Output) -> Result<Span, Failure> {
    let (mut first, mut count, mut last) = (None, 0, None);
    while let Some((line, ticket, message)) = tickets.recv().await {
        let seq = ticket.wait().await?;
        if output.is_json() {
            room().await?;
        }
        let mut ack = json!({"event": "ack", "seq": seq, "line": line});
        if let Some(message) = message {
            ack["message"] = json!(message.to_string());
        }
        output.json_only(&ack)?;
        first.get_or_insert(seq);
        count += 1;
        acked.store(count, Ordering::Relaxed);
        last = Some(seq);
    }
    Ok(((first.unwrap_or(0), count), last))
}
