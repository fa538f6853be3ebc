//! The admin listener: metrics, health and status over HTTP, for the operator's own network. It has no authentication and changes nothing.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use mainstay_server::OPERATOR_CONNECTIONS;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::failure::Failure;

/// What the admin listener shows.
pub(crate) trait Shown: Send + Sync + 'static {
    /// Metrics in the text format of OpenMetrics.
    fn metrics(&self) -> String;
    /// What it is doing, as JSON.
    fn status(&self) -> String;
    /// Why it should get no new clients, if it should not.
    fn unready(&self) -> Option<String>;
    /// Why it should be started again, if it should.
    fn unhealthy(&self) -> Option<String>;
}

/// How long a request may take to come.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves until it is dropped. Errors: the address cannot be listened on.
pub(super) async fn listen(
    addr: SocketAddr,
    shown: Arc<dyn Shown>,
) -> Result<(SocketAddr, impl Future<Output = ()>), Failure> {
    let listener = TcpListener::bind(addr).await;
    let listener =
        listener.map_err(|error| Failure::io(format!("cannot listen on {addr} for the operator"), &error))?;
    let addr = listener.local_addr().map_err(|error| Failure::io("the admin listener", &error))?;
    Ok((addr, serve(listener, shown)))
}

async fn serve(listener: TcpListener, shown: Arc<dyn Shown>) {
    // Owned here: nothing of them is left when this ends.
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= OPERATOR_CONNECTIONS {
            connections.join_next().await;
        }
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((stream, _)) = accepted else {
            // Out of file descriptors: that passes.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let shown = shown.clone();
        connections.spawn(async move {
            let service = service_fn(|request| {
                let answer = answer(&request, &*shown);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service);
            // A client that breaks off concerns nobody else.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "admin connection");
            }
        });
    }
}

fn answer(request: &Request<Incoming>, shown: &dyn Shown) -> Response<Full<Bytes>> {
    let text = |status: StatusCode, kind: &'static str, body: String| {
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        response
    };
    let plain = "text/plain; charset=utf-8";
    let probe = |why: Option<String>| match why {
        None => text(StatusCode::OK, plain, "ok\n".into()),
        Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, plain, why + "\n"),
    };
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, plain, "only GET\n".into());
    }
    match request.uri().path() {
        "/metrics" => {
            text(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", shown.metrics())
        }
        "/status" => text(StatusCode::OK, "application/json", shown.status()),
        "/livez" => probe(shown.unhealthy()),
        "/readyz" => probe(shown.unready()),
        _ => text(StatusCode::NOT_FOUND, plain, "/metrics, /livez, /readyz and /status are here\n".into()),
    }
}
