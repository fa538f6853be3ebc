//! A client against a server that answers with arbitrary bytes: nothing panics, and the application always gets an answer.
//!
//! The input is cut at 0xf5; the first byte of each piece chooses the stream.
#![no_main]

use std::time::Duration;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mainstay_client::{Client, Config, Start};
use mainstay_protocol::session::{Incarnation, Verdict, ViewHash};
use mainstay_protocol::wire::{Attached, Frame, Hello, Label, Subscribed};
use mainstay_transport::memory::{MemoryConnection, MemoryListener, MemoryNetwork};
use mainstay_transport::{Connection, Listener, RecvStream, SendStream};

async fn serve(connection: MemoryConnection, data: Vec<u8>) -> Option<()> {
    let (mut control, mut recv) = connection.accept_bi().await.ok()?;
    tokio::spawn(async move { while let Ok(Some(_)) = recv.read().await {} });
    control.write(&mut [Frame::from(Hello::default()).to_bytes()]).await.ok()?;
    let (mut attachment, mut recv) = connection.accept_bi().await.ok()?;
    tokio::spawn(async move { while let Ok(Some(_)) = recv.read().await {} });
    let attached = Attached {
        verdict: Verdict::Exact,
        incarnation: Incarnation([1; 16]),
        tail: 0,
        first: 0,
        created: 0,
        closed: false,
        fold_version: mainstay_protocol::registry::FOLD_VERSION,
        view_hash: ViewHash([0; 32]),
        streams: vec![Label::new("main").ok()?],
        positions: vec![],
    };
    attachment.write(&mut [Frame::from(attached).to_bytes()]).await.ok()?;
    let mut subscription = connection.open_uni().await.ok()?;
    let subscribed = Subscribed { id: 1, verdict: Verdict::Exact, next: 0, tail: 0 };
    subscription.write(&mut [Frame::from(subscribed).to_bytes()]).await.ok()?;
    for piece in data.split(|byte| *byte == 0xf5) {
        let Some((&to, bytes)) = piece.split_first() else { continue };
        let bytes = Bytes::copy_from_slice(bytes);
        let _ = match to % 4 {
            0 => control.write(&mut [bytes]).await,
            1 => attachment.write(&mut [bytes]).await,
            2 => subscription.write(&mut [bytes]).await,
            _ => match connection.open_uni().await {
                Ok(mut stream) => stream.write(&mut [bytes]).await,
                Err(_) => return None,
            },
        };
    }
    tokio::time::sleep(Duration::from_millis(1)).await;
    Some(())
}

async fn server(listener: MemoryListener, data: Vec<u8>) {
    while let Some(connection) = listener.accept().await {
        tokio::spawn(serve(connection, data.clone()));
    }
}

fuzz_target!(|data: &[u8]| {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let mut config = Config::default();
        config.give_up_after = Some(Duration::from_secs(1));
        let limits = config.transport_limits();
        let server_limits = mainstay_server::Config::default().transport_limits();
        let (network, listener) = MemoryNetwork::new(server_limits, limits);
        tokio::spawn(server(listener, data.to_vec()));
        let client = Client::new(network, config);
        let work = async {
            let session = client.session("s").ok()?.create().attach().await.ok()?;
            let mut subscription = session.subscribe(Start::Earliest).open().await.ok()?;
            let producing = async {
                let producer = session.producer("p").await.ok()?;
                producer.append(session.main(), "x").await.ok()?.await.ok()
            };
            let reading = async {
                while let Some(Ok(event)) = subscription.next().await {
                    if let mainstay_client::Event::Records(batch) = event {
                        batch.iter().for_each(drop);
                    }
                }
            };
            tokio::join!(producing, reading);
            Some(())
        };
        let _ = tokio::time::timeout(Duration::from_secs(3), work).await;
    });
});
