//! A TCP proxy between the relay and a server, to cut, silence, slow down and heal the link.
//!
//! The mode holds for all connections at once and may change at any time. While a direction is dead,
//! what was sent waits and arrives after the healing, as with a network that lost packets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const PIECE: usize = 64 * 1024;
/// Pauses of a throttled link.
const THROTTLE_STEP: Duration = Duration::from_millis(50);

/// What the link does. "Up" is from the relay to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Everything goes through.
    Pass,
    /// Each piece, in each direction, waits this long.
    Delay(Duration),
    /// So many bytes a second in each direction.
    Throttle(usize),
    /// Connections are reset (RST), new ones too.
    Cut,
    /// Connections are ended in order (FIN), new ones too.
    Close,
    /// Connections stay, and nothing goes through.
    Silent,
    /// Nothing reaches the server; its words still arrive.
    DeadUp,
    /// Nothing comes from the server; our words still reach it.
    DeadDown,
    /// Each connection is reset when one byte more than these wants to go up, wherever that is in a frame.
    CutAfter(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

/// How a connection ended.
enum End {
    ByPeer,
    Closed,
    Reset,
}

/// A proxy on a loopback port.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    link: Arc<watch::Sender<Link>>,
    broken: Arc<AtomicU64>,
}

/// Host and port of a URL.
///
/// # Panics
///
/// If it has none.
pub fn target_of(url: &str) -> String {
    let url = url::Url::parse(url).expect("URL");
    format!("{}:{}", url.host_str().expect("host"), url.port().expect("port"))
}

/// The same URL, with another host and port.
///
/// # Panics
///
/// If it is no URL with a host.
pub fn led_to(address: SocketAddr, url: &str) -> String {
    let mut url = url::Url::parse(url).expect("URL");
    url.set_ip_host(address.ip()).expect("host");
    url.set_port(Some(address.port())).expect("port");
    url.to_string()
}

impl Proxy {
    /// A proxy to the host and port of a URL.
    ///
    /// # Panics
    ///
    /// If the URL has no host and port, or no loopback port can be had.
    pub async fn to(url: &str) -> Self {
        let target = target_of(url);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let address = listener.local_addr().expect("address");
        let link = Arc::new(watch::Sender::new(Link::Pass));
        let broken = Arc::new(AtomicU64::new(0));
        let (state, count) = (Arc::clone(&link), Arc::clone(&broken));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, target.clone(), state.subscribe(), Arc::clone(&count)));
            }
        });
        Self { address, link, broken }
    }

    /// The same URL, led through the proxy.
    ///
    /// # Panics
    ///
    /// If it is no URL with a host.
    pub fn url(&self, url: &str) -> String {
        led_to(self.address, url)
    }

    /// Changes what the link does.
    pub fn set(&self, link: Link) {
        self.link.send_replace(link);
    }

    /// No connection is open. What one that was cut had under way is gone then.
    pub fn is_idle(&self) -> bool {
        // Each connection listens for changes of the link.
        self.link.receiver_count() == 0
    }

    /// Connections that this proxy has ended so far; each may cost a window of unknown outcomes.
    pub fn broken(&self) -> u64 {
        self.broken.load(Relaxed)
    }
}

async fn carry(mut client: TcpStream, target: String, link: watch::Receiver<Link>, broken: Arc<AtomicU64>) {
    let now = *link.borrow();
    if now == Link::Close {
        return;
    }
    // Nobody listens behind us: refused as the server itself would refuse.
    let server = if now == Link::Cut { None } else { TcpStream::connect(target).await.ok() };
    let Some(mut server) = server else {
        let _ = client.set_zero_linger();
        return;
    };
    let end = {
        let ((client_read, client_write), (server_read, server_write)) = (client.split(), server.split());
        tokio::select! {
            end = pump(client_read, server_write, link.clone(), Direction::Up) => end,
            end = pump(server_read, client_write, link, Direction::Down) => end,
        }
    };
    match end {
        End::ByPeer => return,
        End::Closed => {}
        End::Reset => {
            let _ = client.set_zero_linger();
            let _ = server.set_zero_linger();
        }
    }
    broken.fetch_add(1, Relaxed);
}

/// What a mode means for the next piece of one direction.
enum Step {
    End(End),
    Wait,
    Move { at_most: usize, then_wait: Duration },
}

fn step(link: Link, direction: Direction, carried: usize) -> Step {
    let freely = |at_most| Step::Move { at_most, then_wait: Duration::ZERO };
    match (link, direction) {
        (Link::Cut, _) => Step::End(End::Reset),
        (Link::Close, _) => Step::End(End::Closed),
        (Link::Silent, _) | (Link::DeadUp, Direction::Up) | (Link::DeadDown, Direction::Down) => Step::Wait,
        (Link::Delay(pause), _) => Step::Move { at_most: PIECE, then_wait: pause },
        (Link::Throttle(rate), _) => Step::Move { at_most: (rate / 20).max(1), then_wait: THROTTLE_STEP },
        (Link::CutAfter(bytes), Direction::Up) => freely(bytes.saturating_sub(carried).clamp(1, PIECE)),
        _ => freely(PIECE),
    }
}

async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut link: watch::Receiver<Link>,
    direction: Direction,
) -> End {
    let mut buffer = vec![0; PIECE];
    // Bytes since the mode last changed.
    let (mut mode, mut carried) = (Link::Pass, 0);
    loop {
        let now = *link.borrow_and_update();
        if now != mode {
            (mode, carried) = (now, 0);
        }
        let (at_most, pause) = match step(now, direction, carried) {
            Step::End(end) => return end,
            Step::Wait => {
                if link.changed().await.is_err() {
                    return End::ByPeer;
                }
                continue;
            }
            Step::Move { at_most, then_wait } => (at_most, then_wait),
        };
        let length = tokio::select! {
            biased;
            changed = link.changed() => {
                if changed.is_err() {
                    return End::ByPeer;
                }
                continue;
            }
            read = from.read(&mut buffer[..at_most]) => match read {
                Ok(0) | Err(_) => return End::ByPeer,
                Ok(length) => length,
            },
        };
        if let (Link::CutAfter(bytes), Direction::Up) = (mode, direction)
            && carried + length > bytes
        {
            return End::Reset;
        }
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return End::ByPeer;
        }
        carried += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// A server that sends back what it gets.
    async fn echo() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("tcp://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        url
    }

    async fn through(link: Link) -> (Proxy, TcpStream) {
        let proxy = Proxy::to(&echo().await).await;
        let mut stream = TcpStream::connect(proxy.address).await.unwrap();
        assert!(says(&mut stream, b"hello").await, "passes at first");
        proxy.set(link);
        (proxy, stream)
    }

    async fn says(stream: &mut TcpStream, words: &[u8]) -> bool {
        let mut answer = vec![0; words.len()];
        stream.write_all(words).await.is_ok()
            && stream.read_exact(&mut answer).await.is_ok()
            && answer == words
    }

    #[tokio::test]
    async fn a_cut_is_a_reset_and_a_close_is_an_end() {
        let (proxy, mut stream) = through(Link::Cut).await;
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert_eq!(proxy.broken(), 1);
        let (proxy, mut stream) = through(Link::Close).await;
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
        proxy.set(Link::Pass);
        let mut stream = TcpStream::connect(proxy.address).await.unwrap();
        assert!(says(&mut stream, b"again").await);
    }

    #[tokio::test]
    async fn a_dead_direction_keeps_what_was_sent_until_it_heals() {
        for link in [Link::Silent, Link::DeadUp, Link::DeadDown] {
            let (proxy, mut stream) = through(link).await;
            stream.write_all(b"later").await.unwrap();
            let silence = tokio::time::timeout(Duration::from_millis(100), stream.read_u8()).await;
            assert!(silence.is_err(), "{link:?} lets something through");
            proxy.set(Link::Pass);
            let mut answer = [0; 5];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"later");
            assert_eq!(proxy.broken(), 0);
        }
    }

    #[tokio::test]
    async fn a_cut_comes_after_exactly_so_many_bytes() {
        let (proxy, mut stream) = through(Link::CutAfter(10)).await;
        assert!(says(&mut stream, b"0123456789").await, "ten bytes pass");
        let _ = stream.write_all(b"x").await;
        assert!(stream.read_u8().await.is_err(), "the eleventh does not");
        assert_eq!(proxy.broken(), 1);
    }

    #[tokio::test]
    async fn slow_links_are_slow_and_lose_nothing() {
        for link in [Link::Throttle(20_000), Link::Delay(Duration::from_millis(100))] {
            let (_proxy, mut stream) = through(link).await;
            let begun = Instant::now();
            assert!(says(&mut stream, &[7; 2_000]).await);
            assert!(begun.elapsed() >= Duration::from_millis(150), "{link:?} took {:?}", begun.elapsed());
        }
    }
}
