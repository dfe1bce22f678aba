package stream

import (
	"bytes"
	"errors"
	"net"
	"testing"
	"time"
)

func TestPatternFillAnyOffset(t *testing.T) {
	p := NewPattern(7)
	whole := make([]byte, 5*BlockSize)
	p.Fill(whole, 0)
	for off := 0; off < 4*BlockSize; off += 509 {
		part := make([]byte, 700)
		p.Fill(part, uint64(off))
		if !bytes.Equal(part, whole[off:off+len(part)]) {
			t.Fatalf("Fill at offset %d differs from the stream filled at once", off)
		}
	}
}

func TestPatternCheckFindsEveryFault(t *testing.T) {
	p, scratch := NewPattern(7), make([]byte, 4*BlockSize)
	good := make([]byte, 4*BlockSize)
	p.Fill(good, 0)
	if at, ok := p.Check(good, 0, scratch); !ok {
		t.Fatalf("the stream itself differs at %d", at)
	}
	flipped := bytes.Clone(good)
	flipped[5000] ^= 1
	exchanged := append(append(bytes.Clone(good[BlockSize:2*BlockSize]), good[:BlockSize]...), good[2*BlockSize:]...)
	for name, b := range map[string][]byte{"flipped": flipped, "exchanged": exchanged, "shifted": good[1:]} {
		if _, ok := p.Check(b, 0, scratch); ok {
			t.Errorf("%s: not found", name)
		}
	}
}

func pipe(t *testing.T) (net.Conn, net.Conn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func TestTransferBothWays(t *testing.T) {
	for _, mode := range []Mode{Sink, Source} {
		a, b := pipe(t)
		type served struct {
			r   Result
			err error
		}
		done := make(chan served, 1)
		go func() {
			_, r, err := Serve(b)
			done <- served{r, err}
		}()
		r, err := Transfer(a, Header{Mode: mode, Seed: 3, Bytes: 3<<20 + 17})
		s := <-done
		if err != nil || s.err != nil {
			t.Fatalf("mode %d: %v, %v", mode, err, s.err)
		}
		if r.Bytes != 3<<20+17 || s.r.Bytes != r.Bytes || s.r.CRC32C != r.CRC32C {
			t.Errorf("mode %d: %v here, %v there", mode, r, s.r)
		}
	}
}

// TestServeSeesOtherContent: the far end sends the bytes of another seed.
func TestServeSeesOtherContent(t *testing.T) {
	a, b := pipe(t)
	done := make(chan error, 1)
	go func() {
		_, err := receive(b, Header{Seed: 2, Bytes: 1 << 20})
		b.Close()
		done <- err
	}()
	_, _ = send(a, Header{Seed: 1, Bytes: 1 << 20})
	if err := <-done; !errors.Is(err, ErrContent) {
		t.Errorf("receive = %v, want ErrContent", err)
	}
}

func TestEcho(t *testing.T) {
	server, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go ServeEcho(server)
	conn, err := net.Dial("udp", server.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	e, err := NewEcho(conn, 1200, 9)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { e.Receive(); close(ended) }()
	for range 20 {
		e.Send()
	}
	for end := time.Now().Add(30 * time.Second); e.Counters().Received < 20 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	c := e.Counters()
	conn.Close()
	<-ended
	if c.Received != 20 || c.Bad != 0 || c.Repeated != 0 {
		t.Errorf("counters %+v, want 20 received, none bad or repeated", c)
	}
	e.count([]byte("too short for a datagram of this size"), make([]byte, 1200))
	if e.Counters().Bad != 1 {
		t.Error("a wrong datagram was not counted as bad")
	}
}
