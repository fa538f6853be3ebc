//! A server against a client that sends arbitrary bytes on every kind of stream: nothing panics, and an honest client beside it is
//! served as if nothing happened.
//!
//! The first byte of each piece chooses the stream; the input is cut at 0xf5, which begins no frame type in use.
#![no_main]

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mainstay_client::{Client, Config as ClientConfig};
use mainstay_protocol::session::{Grant, Grants, Instance, Operations};
use mainstay_protocol::wire::{Attach, AttachMode, Frame, Hello, OpenProducer, Produce, Subject};
use mainstay_server::auth::{Claims, Keyring, SigningKey};
use mainstay_server::{Config, ResumeKeys, Server};
use mainstay_store::MemoryStore;
use mainstay_transport::memory::{MemoryConnection, MemoryNetwork};
use mainstay_transport::{Connection, Connector, RecvStream, SendStream};

fn key() -> &'static (SigningKey, String) {
    static KEY: OnceLock<(SigningKey, String)> = OnceLock::new();
    KEY.get_or_init(|| {
        let key = SigningKey::generate().expect("a key");
        let grant = Grant { prefix: String::new(), operations: Operations::all() };
        let subject = Subject::new("fuzzer").expect("a valid subject");
        let claims = Claims::new(subject, Grants(vec![grant]), 0, 1 << 34);
        let token = key.mint(&claims).expect("a token");
        (key, token)
    })
}

fn attach(name: &str) -> Bytes {
    let session = name.parse().expect("a valid name");
    Frame::from(Attach { mode: AttachMode::Create, session, incarnation: None, next: None, expire_after: None })
        .to_bytes()
}

async fn open(connection: &MemoryConnection, first: Bytes) -> Option<<MemoryConnection as Connection>::Send> {
    let (mut send, mut recv) = connection.open_bi().await.ok()?;
    send.write(&mut [first]).await.ok()?;
    tokio::spawn(async move { while let Ok(Some(_)) = recv.read().await {} });
    Some(send)
}

async fn hostile(network: Arc<MemoryNetwork>, data: Vec<u8>) -> Option<()> {
    let connection = network.connect(true).await.ok()?;
    let token = key().1.clone();
    let hello = Hello { instance: Some(Instance([6; 16])), token: Some(token.into()), ..Hello::default() };
    let mut control = open(&connection, Frame::from(hello).to_bytes()).await?;
    let mut attachment = open(&connection, attach("hostile")).await?;
    let producer = OpenProducer { id: 1, name: "p".parse().ok()?, epoch: 0 };
    attachment.write(&mut [Frame::from(producer).to_bytes()]).await.ok()?;
    tokio::time::sleep(Duration::from_millis(1)).await;
    let mut batches = connection.open_uni().await.ok()?;
    batches.write(&mut [Frame::from(Produce { producer: 1 }).to_bytes()]).await.ok()?;
    for piece in data.split(|byte| *byte == 0xf5) {
        let Some((&to, bytes)) = piece.split_first() else { continue };
        let bytes = Bytes::copy_from_slice(bytes);
        // What the server closed or stopped stays so.
        let _ = match to % 6 {
            0 => control.write(&mut [bytes]).await,
            1 => attachment.write(&mut [bytes]).await,
            2 => batches.write(&mut [bytes]).await,
            3 | 4 => {
                open(&connection, bytes).await;
                Ok(())
            }
            _ => match connection.open_uni().await {
                Ok(mut stream) => stream.write(&mut [bytes]).await,
                Err(_) => return None,
            },
        };
    }
    tokio::time::sleep(Duration::from_millis(1)).await;
    Some(())
}

fuzz_target!(|data: &[u8]| {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let config = Config::default();
        let limits = ClientConfig::default().transport_limits();
        let (network, listener) = MemoryNetwork::new(config.transport_limits(), limits);
        let resume = ResumeKeys::generate().expect("a key");
        let keyring = Keyring::new([key().0.verifying_key()]);
        let server = Server::new(Arc::new(MemoryStore::new()), keyring, resume, config);
        tokio::spawn(async move { server.serve(listener, std::future::pending()).await });
        let mut config = ClientConfig::default();
        config.token = Some(key().1.clone());
        let honest = Client::new(network.clone(), config);
        let session = honest.session("honest").expect("a name").create().attach().await.expect("attach");
        let producer = session.producer("p").await.expect("a producer");
        let _ = tokio::time::timeout(Duration::from_secs(60), hostile(network, data.to_vec())).await;
        let ticket = producer.append(session.main(), "still here").await.expect("append");
        assert_eq!(ticket.await, Ok(0));
    });
});
