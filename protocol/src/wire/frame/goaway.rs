//! GOAWAY: the server is about to close the connection (spec CONN-10).

use core::net::{Ipv6Addr, SocketAddr};

use bytes::Bytes;

use crate::error::ProtocolError;
use crate::registry::goaway;
use crate::wire::{Body, Detail, Field, Params, Reader, Writer};

/// Sent by the server on the control QUIC stream before an orderly stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoAway {
    /// Milliseconds until the server closes the connection.
    pub deadline: u64,
    /// Milliseconds over which clients should spread their return, each choosing a random delay below it.
    pub spread: u64,
    /// Why, for people.
    pub detail: Detail,
    /// Where the process that takes its place listens, if that is another address.
    pub address: Option<SocketAddr>,
}

impl Body for GoAway {
    const KIND: u64 = 0x0a;

    fn put(&self, w: &mut Writer) {
        self.deadline.put(w);
        self.spread.put(w);
        self.detail.put(w);
        let mut params = Params::default();
        if let Some(address) = &self.address {
            let ip = match address {
                SocketAddr::V4(v4) => v4.ip().to_ipv6_mapped(),
                SocketAddr::V6(v6) => *v6.ip(),
            };
            let bytes = [&ip.octets()[..], &address.port().to_be_bytes()].concat();
            params.insert(goaway::ADDRESS, Bytes::from(bytes));
        }
        params.put(w);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let (deadline, spread, detail) = (Field::get(r)?, Field::get(r)?, Field::get(r)?);
        let mut params = Params::get(r)?;
        let address = params.remove(goaway::ADDRESS).map(|value| {
            let bytes: Option<[u8; 18]> = value.as_ref().try_into().ok();
            let parts = bytes.and_then(|bytes| bytes.first_chunk::<16>().copied().zip(bytes.last_chunk::<2>().copied()));
            let (ip, port) = parts.ok_or(ProtocolError::malformed("the address is not 16 bytes and a port"))?;
            Ok(SocketAddr::new(Ipv6Addr::from(ip).to_canonical(), u16::from_be_bytes(port)))
        });
        params.finish()?;
        Ok(Self { deadline, spread, detail, address: address.transpose()? })
    }
}
