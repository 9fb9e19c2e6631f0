package criu

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Fields that CRIU writes since 4.1 and 4.2 and that the descriptions in go-criu v7
// lack. A message keeps them as unknown fields.
const (
	credsNoNewPrivs = 18
	credsAmbient    = 19
	pagemapPages    = 5 // 64 bits, where nr_pages has 32.
)

// numbers returns the values of such a field in their order. As every reader of the
// format must, it also takes them packed.
func numbers(m proto.Message, field protowire.Number) []uint64 {
	if m == nil || !m.ProtoReflect().IsValid() {
		return nil
	}
	var out []uint64
	for b := []byte(m.ProtoReflect().GetUnknown()); len(b) > 0; {
		num, kind, n := protowire.ConsumeTag(b)
		size := protowire.ConsumeFieldValue(num, kind, b[max(n, 0):])
		if n < 0 || size < 0 {
			return out // Not possible: unmarshalling has checked it.
		}
		value := b[n : n+size]
		b = b[n+size:]
		switch {
		case num != field:
		case kind == protowire.VarintType:
			v, _ := protowire.ConsumeVarint(value)
			out = append(out, v)
		case kind == protowire.BytesType:
			packed, _ := protowire.ConsumeBytes(value)
			for len(packed) > 0 {
				v, n := protowire.ConsumeVarint(packed)
				if n < 0 {
					break
				}
				out = append(out, v)
				packed = packed[n:]
			}
		}
	}
	return out
}

// last returns the value of a field that occurs once: of several the last counts.
func last(m proto.Message, field protowire.Number) (uint64, bool) {
	v := numbers(m, field)
	if len(v) == 0 {
		return 0, false
	}
	return v[len(v)-1], true
}

// with adds values to a message.
func with[T proto.Message](m T, field protowire.Number, values ...uint64) T {
	r := m.ProtoReflect()
	b := []byte(r.GetUnknown())
	for _, v := range values {
		b = protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
	}
	r.SetUnknown(b)
	return m
}
