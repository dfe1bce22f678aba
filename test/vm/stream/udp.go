package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// MinDatagram is the smallest payload that Echo sends: its sequence number.
const MinDatagram = 8

// EchoCounters tell what Echo saw.
type EchoCounters struct {
	Sent     uint64 `json:"sent"`
	Received uint64 `json:"received"` // each sequence number once
	Repeated uint64 `json:"repeated"` // the same sequence number again
	Bad      uint64 `json:"bad"`      // wrong length, number or content
	// LongestGap is the longest time between two replies, from the first datagram on.
	LongestGap time.Duration `json:"longest_gap_ns"`
	// LastReply is how long ago the last reply came when the counters were read; as old as Echo itself if none did.
	LastReply time.Duration `json:"last_reply_ns"`
}

// Echo sends numbered datagrams and checks what comes back.
type Echo struct {
	conn    net.Conn
	size    int
	pattern *Pattern

	mu       sync.Mutex
	counters EchoCounters
	seen     map[uint64]bool
	last     time.Time
}

// NewEcho prepares datagrams of size payload bytes over a connected UDP socket. The caller closes conn to end Receive.
func NewEcho(conn net.Conn, size int, seed uint64) (*Echo, error) {
	if size < MinDatagram || size > 65507 {
		return nil, fmt.Errorf("datagram of %d bytes: want %d to 65507", size, MinDatagram)
	}
	return &Echo{conn: conn, size: size, pattern: NewPattern(seed), seen: map[uint64]bool{}, last: time.Now()}, nil
}

// Send sends the next datagram. A refused or unreachable destination is not an error: the datagram counts as sent.
func (e *Echo) Send() {
	e.mu.Lock()
	seq := e.counters.Sent
	e.counters.Sent++
	e.mu.Unlock()
	b := make([]byte, e.size)
	e.pattern.Fill(b, seq*BlockSize)
	binary.BigEndian.PutUint64(b, seq)
	_, _ = e.conn.Write(b)
}

// Receive counts replies until the connection is closed.
func (e *Echo) Receive() {
	b, want := make([]byte, 65536), make([]byte, e.size)
	for {
		n, err := e.conn.Read(b)
		if isClosed(err) {
			return
		}
		if err == nil {
			e.count(b[:n], want)
		}
	}
}

func (e *Echo) count(b, want []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	seq, ok := e.valid(b, want)
	switch {
	case !ok:
		e.counters.Bad++
	case e.seen[seq]:
		e.counters.Repeated++
	default:
		e.seen[seq] = true
		e.counters.Received++
		now := time.Now()
		e.counters.LongestGap = max(e.counters.LongestGap, now.Sub(e.last))
		e.last = now
	}
}

func (e *Echo) valid(b, want []byte) (uint64, bool) {
	if len(b) != e.size {
		return 0, false
	}
	seq := binary.BigEndian.Uint64(b)
	e.pattern.Fill(want, seq*BlockSize)
	return seq, seq < e.counters.Sent && string(b[8:]) == string(want[8:])
}

// Counters returns what was seen so far.
func (e *Echo) Counters() EchoCounters {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.counters
	c.LastReply = time.Since(e.last)
	return c
}

// ServeEcho returns every datagram to where it came from, until conn is closed.
func ServeEcho(conn *net.UDPConn) {
	b := make([]byte, 65536)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(b)
		if isClosed(err) {
			return
		}
		if err == nil {
			_, _ = conn.WriteToUDPAddrPort(b[:n], from)
		}
	}
}

// isClosed tells a closed socket from errors that pass, such as an ICMP message for an earlier datagram.
func isClosed(err error) bool { return errors.Is(err, net.ErrClosed) }
