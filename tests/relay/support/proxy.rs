//! A TCP proxy between the relay and a server, to cut, silence and heal the link.

use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the link does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Everything goes through.
    Pass,
    /// Connections end at once, new ones too.
    Cut,
    /// Connections stay, and nothing goes through.
    Silent,
}

/// A proxy on a loopback port.
#[derive(Debug)]
pub struct Proxy {
    pub address: SocketAddr,
    link: Arc<watch::Sender<Link>>,
}

impl Proxy {
    /// A proxy to the host and port of a URL.
    pub async fn to(url: &str) -> Self {
        let url = url::Url::parse(url).expect("URL");
        let target = format!("{}:{}", url.host_str().expect("host"), url.port().expect("port"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let address = listener.local_addr().expect("address");
        let link = Arc::new(watch::Sender::new(Link::Pass));
        let state = Arc::clone(&link);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, target.clone(), state.subscribe()));
            }
        });
        Self { address, link }
    }

    /// The same URL, led through the proxy.
    pub fn url(&self, url: &str) -> String {
        let mut url = url::Url::parse(url).expect("URL");
        url.set_port(Some(self.address.port())).expect("port");
        url.to_string()
    }

    pub fn set(&self, link: Link) {
        self.link.send_replace(link);
    }
}

async fn carry(client: TcpStream, target: String, link: watch::Receiver<Link>) {
    if *link.borrow() == Link::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect(target).await else { return };
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    tokio::select! {
        () = pump(client_read, server_write, link.clone()) => {}
        () = pump(server_read, client_write, link) => {}
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut link: watch::Receiver<Link>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let state = *link.borrow_and_update();
        match state {
            Link::Cut => return,
            Link::Silent => {
                if link.changed().await.is_err() {
                    return;
                }
            }
            Link::Pass => tokio::select! {
                biased;
                _ = link.changed() => {}
                read = from.read(&mut buffer) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(length) => if to.write_all(&buffer[..length]).await.is_err() { return },
                },
            },
        }
    }
}
