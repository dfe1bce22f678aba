package user

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// dgram is a connected socket of the host's that carries the datagrams of one flow. Writing never waits.
type dgram struct {
	usage
	conn *net.UDPConn
	rc   syscall.RawConn

	mu      sync.Mutex // of what follows, for writing
	out     []byte
	outErr  error
	writeFn func(fd uintptr) bool
}

func (d *dgram) init(conn *net.UDPConn) error {
	rc, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	d.conn, d.rc = conn, rc
	d.writeFn = d.tryWrite
	d.touch()
	return nil
}

func (d *dgram) tryWrite(fd uintptr) bool {
	_, d.outErr = unix.Write(int(fd), d.out)
	return true
}

// write sends b, or drops it when the host has no room. The error may be that of a datagram before.
func (d *dgram) write(b []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.touch()
	d.out = b
	err := d.rc.Write(d.writeFn)
	d.out = nil
	if err == nil {
		err = d.outErr
	}
	if errors.Is(err, unix.EAGAIN) {
		return nil
	}
	return err
}

// evict makes read return.
func (d *dgram) evict() {
	d.evicted.Store(true)
	d.conn.SetReadDeadline(time.Unix(1, 0))
}

// read gives every datagram from the host to deliver, and what the host says of those to it to failed, until the flow has been idle for
// too long, or is evicted.
func (d *dgram) read(deliver func([]byte), failed func(error)) {
	in := lazyReader{chunk: toHostChunk, datagrams: true}
	in.read = in.tryRead
	for !d.evicted.Load() {
		d.conn.SetReadDeadline(d.expires())
		if d.evicted.Load() {
			return // the deadline of evict may have been overwritten
		}
		n, err := in.next(d.rc)
		switch {
		case err == nil:
			d.replied.Store(true)
			d.touch()
			deliver(in.buf[:n])
			in.free()
		case errors.Is(err, os.ErrDeadlineExceeded):
			if time.Now().After(d.expires()) {
				return
			}
		case errors.Is(err, net.ErrClosed):
			return
		default:
			failed(err)
		}
	}
}
