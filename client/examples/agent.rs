//! An agent: says a few words in a message that everybody who follows sees grow, and ends its run.
//!
//! `cargo run -p mainstay-client --example agent -- connect.json chat`, beside `mainstay serve --dev` and `mainstay tail chat --fold`.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use mainstay_client::{Client, Config, ConnectFile, MessageWriter, Status};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (file, name) = (args.next().ok_or("which connection file?")?, args.next().ok_or("which session?")?);
    let words = ["I", " looked", " into", " it."];

    // ANCHOR: agent
    let client = Client::connect_quic(&ConnectFile::read(Path::new(&file))?, Config::default())?;
    let session = client.session(&name)?.create().attach().await?;
    let run = session.start_run(Duration::from_secs(30), None).await?; // under a lease, which is renewed by itself
    let producer = session.producer("agent").await?;
    let message = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await?;
    for word in words {
        message.append(word).await?; // goes on at once; the ticket that comes back says when it is durable
    }
    message.end(Status::Complete, "").await?;
    run.end(&producer, Status::Complete, "").await?.await?; // everything before it is durable too
    // ANCHOR_END: agent

    client.finish().await;
    Ok(())
}
